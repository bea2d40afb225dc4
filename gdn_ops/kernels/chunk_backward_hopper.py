"""Launching stages of the chunked backward in Gluon, where that serves a call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunk_backward_beta import chunk_beta_kernel
from .chunk_backward_places import PLACE_BN, chunk_padding_kernel, chunk_places_kernel
from .chunk_hopper import pick_rows, serves
from .chunk_segments import WHOLE, Split
from .configs import Gpu, cdiv, next_power_of_2
from .launch import OPTIONS, strides

# Chunks of a segment in the stages that walk, at least.
LEAST = 16


def serves_backward(
    do_dtype: torch.dtype, dtype: torch.dtype, K: int, V: int, use_descriptors: bool, gpu: Gpu
) -> bool:
    """Whether the stages after ``prepare`` have kernels in Gluon for a call.

    us of forward and backward, 16 key heads and 32 value heads, plain / Gluon (H200, Triton 3.6,
    2026-11-30):

        1x8192        4x8192         1x32768
        1456 / 850    3948 / 2243    5567 / 3248

    Args:
        do_dtype: Dtype of the gradient of the output.
        dtype: Dtype of tokens.
        K: Key size.
        V: Value size.
        use_descriptors: Whether tokens may be read and written by tensor descriptors.
        gpu: The GPU.
    """
    return serves(K, V, gpu) and use_descriptors and dtype == do_dtype == torch.bfloat16


class Walks(NamedTuple):
    """The kernels of the first two stages, each with what its launch has else."""

    split: Split
    walked: int  # sequences, or segments
    replay: Any
    of_replay: dict[str, Any]
    reverse: Any
    of_reverse: dict[str, Any]


def pick_walks(N: int, chunks: int, HV: int, is_packed: bool, gpu: Gpu) -> Walks:
    """The first two stages of ``N`` sequences with so many ``chunks`` each."""
    # Not at the top: a Triton without Gluon has the other kernels.
    from .chunk_backward_replay_hopper import replay_hopper_kernel
    from .chunk_backward_reverse_hopper import reverse_hopper_kernel

    split = pick_split(N, chunks, HV, is_packed, gpu)
    walked = N if split == WHOLE else N * split.places(chunks, N, 1, None)
    BV, of_few_roles = pick_rows(walked * HV, gpu)
    options: dict[str, Any] = {"BV": BV, "num_warps": 4, "num_stages": 1}
    options |= split.constants()
    return Walks(
        *(split, walked),
        *(replay_hopper_kernel, options | of_few_roles),
        *(reverse_hopper_kernel, options | {"launch_pdl": True}),
    )


def pick_split(N: int, chunks: int, HV: int, is_packed: bool, gpu: Gpu) -> Split:
    """Segments of sequences where both walks leave multiprocessors idle, if all heads forget."""
    # Each walk has a program for each 64 of 128 rows of the state.
    segments = gpu.multiprocessors // (4 * HV)
    if is_packed or min(segments // N, chunks // LEAST) < 2:
        return WHOLE
    return Split(segments, LEAST, has_maps=False)


def launch_gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor | None,
    G: Tensor,
    states: Tensor,
    writes: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dg: Tensor,
    dbeta: Tensor,
    *,
    scale: float,
    use_qk_l2norm: bool,
    gpu: Gpu,
) -> None:
    """Write the gradients of tokens.

    Args:
        states: ``[2, places, HV, V, K]``, states and their gradients.
        writes: ``[2, B, T, HV, V]``, u and dr.
    """
    # Not at the top: a Triton without Gluon has the other kernels.
    from .chunk_backward_gradients_hopper import gradients_hopper_kernel

    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    count = states.shape[1]
    sizes = {"H": H, "HV": HV, "HAS_BETA": beta is not None, "IS_VARLEN": cu_seqlens is not None}
    places = None
    if cu_seqlens is not None:
        places = _find_places(cu_seqlens, count, (dq, dk, dv, dg, dbeta), g, beta)
    gradients_hopper_kernel[(min(gpu.multiprocessors, count * H),)](
        *(do.contiguous(), q, k, beta, G, places, states, writes, dk, dv, dg, dbeta, dq),
        *q.stride()[:3],
        *k.stride()[:3],
        *strides(beta, 3),
        *(B, T, count // B),
        scale=scale,
        HAS_G=g is not None,
        USE_QK_L2NORM=use_qk_l2norm,
        num_warps=4,
        num_stages=1,
        **sizes,
        **OPTIONS,
    )
    if beta is None:
        return
    del sizes["HAS_BETA"]
    chunk_beta_kernel[(count,)](
        *(k, v, beta, G, places, states[0], *writes, dbeta),
        *k.stride()[:3],
        *v.stride()[:3],
        *strides(beta, 3),
        T,
        K=K,
        V=V,
        USE_QK_L2NORM=use_qk_l2norm,
        BT=64,
        BH=next_power_of_2(HV),
        num_warps=8,
        num_stages=1,
        **sizes,
        **OPTIONS,
    )


def _find_places(
    cu_seqlens: Tensor,
    count: int,
    gradients: tuple[Tensor, ...],
    g: Tensor | None,
    beta: Tensor | None,
) -> Tensor:
    """Where packed sequences have their chunks; the gradients of tokens of none become zero."""
    dq, _, dv, _, _ = gradients
    _, T, H, K = dq.shape
    HV, V = dv.shape[2:]
    places = cu_seqlens.new_empty((count, 2), dtype=torch.int32)
    step = cu_seqlens.stride(0)
    options = {"BT": 64, "num_warps": 4, "num_stages": 1, **OPTIONS}
    chunk_places_kernel[(count,)](cu_seqlens, places, step, T, BN=PLACE_BN, **options)
    chunk_padding_kernel[(cdiv(T, 64),)](
        *(cu_seqlens, *gradients, step, cu_seqlens.shape[0] - 1, T),
        H=H,
        HV=HV,
        K=K,
        V=V,
        HAS_G=g is not None,
        HAS_BETA=beta is not None,
        BW=64,
        **options,
    )
    return places
