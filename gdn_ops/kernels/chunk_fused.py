"""Launching a prefill in one kernel, chunk_fused_hopper.py's, where that is faster than two."""

import torch
from torch import Tensor

from .chunk_hopper import serves
from .configs import Gpu, cdiv
from .launch import launch, strides


def is_faster(K: int, V: int, dtype: torch.dtype, heads: int, gpu: Gpu) -> bool:
    """Whether one kernel serves a call that fits descriptors, and takes less time than two.

    A multiprocessor has one program at a time, which takes longer for a chunk than one of the scan
    alone: one kernel is faster where most multiprocessors have work in every round. us of one / two
    kernels, 16 key heads and 32 value heads, sequences x tokens (H200, Triton 3.6, 2026-11-30);
    packed sequences take up to 2 % more:

        inputs     5x1024      3x2048      4x2048      8x1024      4x8192      64x128
        as given   124 / 138   114 / 139   115 / 170   128 / 181   426 / 604   276 / 334
        l2 norm    138 / 144   131 / 147   131 / 177   140 / 188   490 / 633   293 / 344

    Of 2x4096, where half of the multiprocessors are idle, two kernels take 180 and one 205. Lengths
    of packed sequences are not known here: of one long sequence among short ones one kernel should
    take up to 1.4 times as long as two (by the times of their chains; not measured).

    Args:
        K: Key size.
        V: Value size.
        dtype: Dtype of tokens.
        heads: States of the call.
        gpu: The GPU.
    """
    is_served = serves(K, V, gpu) and dtype == torch.bfloat16
    return is_served and heads >= 0.6 * cdiv(heads, gpu.multiprocessors) * gpu.multiprocessors


def launch_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    final_state: Tensor,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read_indices: Tensor | None,
    *,
    is_pool: bool,
    scale: float,
    use_qk_l2norm: bool,
    null_index: int,
) -> Tensor:
    """``o``, contiguous; the final states are written."""
    # Not at the top: a Triton without Gluon has the other kernels.
    from .chunk_fused_hopper import fused_hopper_kernel

    B, T, H, _ = q.shape
    HV = v.shape[2]
    N = B if cu_seqlens is None else cu_seqlens.shape[0]  # packed: one more, the tokens of none
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    launch(
        fused_hopper_kernel,
        N * HV,
        (
            q,
            k,
            v,
            g,
            beta,
            state,
            final_state,
            state_indices,
            has_initial_state,
            cu_seqlens,
            read_indices,
            o,
        ),
        (
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *strides(g, 3),
            *strides(beta, 3),
            *strides(state, 4),
            *final_state.stride(),
            *strides(state_indices, 1),
            *strides(has_initial_state, 1),
            *strides(cu_seqlens, 1),
            *strides(read_indices, 1),
            *o.stride(),
            T,
        ),
        scale=scale,
        null_index=null_index,
        H=H,
        HV=HV,
        HAS_G=g is not None,
        HAS_BETA=beta is not None,
        HAS_STATE=state is not None,
        HAS_INDICES=state_indices is not None,
        HAS_READ_INDICES=read_indices is not None,
        HAS_INITIAL_STATE=has_initial_state is not None,
        IS_POOL=is_pool,
        IS_VARLEN=cu_seqlens is not None,
        USE_QK_L2NORM=use_qk_l2norm,
        num_warps=4,
        num_stages=1,
    )
    return o
