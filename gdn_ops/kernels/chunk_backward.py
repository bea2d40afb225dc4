"""Gradient of the gated delta rule, in chunks: four launches, each with its stage's file.

    prepare     decays in the chunk and X = (I + A)^-1            chunk_prepare.py
    replay      the state before each chunk, and u                chunk_backward_replay.py
    reverse     the gradient of the state after each chunk, dr    chunk_backward_reverse.py
    gradients   dq dk dv dg dbeta of each chunk                   chunk_backward_gradients.py

The second and the third walk the chunks one after another, in parallel over sequences, value heads
and rows of the state; the others are parallel over chunks. The formulas are those of
``gdn_ops/_chunk_math.py``. All but the first have forms in Gluon too (chunk_backward_hopper.py).
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import chunk
from .chunk_backward_gradients import chunk_gradients_kernel
from .chunk_backward_hopper import launch_gradients, pick_walks, serves_backward
from .chunk_backward_places import PLACE_BN
from .chunk_backward_replay import chunk_replay_kernel
from .chunk_backward_reverse import chunk_reverse_kernel
from .chunk_prepared import DOT, PRECISION, chunk_places, prepare
from .chunk_segments import WHOLE, bound_kept
from .configs import TRITON, Gpu
from .launch import OPTIONS, fits_descriptor, strides
from .plan import Scratch, new_scratch

# Stages of the third stage's loops for packed rows where a GPU is tight, if they are not 1.
PACKED_STAGES: dict[tuple[int, ...], int] = {(3, 8): 3}


class BackwardTiles(NamedTuple):
    """Tiles of the three stages, and how they are launched."""

    BT: int
    BK: int
    BV_SCAN: int  # of the stages that walk chunks
    BV_GRADIENTS: int
    warps_scan: int
    warps_gradients: int
    stages_scan: int
    stages_gradients: int


# A product of 64 rows by warp groups reads transposed operands of 32 columns at wrong places
# (https://github.com/triton-lang/triton/issues/11366), and two groups halve the columns: so heads
# with K below 128 have no tiles of 64 rows, and at K = 256 the stages that walk chunks have none.
# float32 is multiplied without tensor cores: chunks of 32 would need half the memory for states,
# but the reverse scan would have 280 accesses to local memory in its loop. With these tiles no
# stage has any in a loop, up to V = 128 (sm_90, cross-compiled, Triton 3.6.0 and 3.7.1,
# 2026-11-24).
def pick_backward(K: int, V: int, dtype: torch.dtype, gpu: Gpu, is_packed: bool) -> BackwardTiles:
    """Tiles for heads of ``K`` and ``V`` that fit the shared memory of sm_90."""
    BK = max(16, triton.next_power_of_2(K))
    BV = max(16, triton.next_power_of_2(V))
    rows = 16 if gpu.is_tight else 32
    if dtype == torch.float32:
        return BackwardTiles(16, BK, min(BV, rows), min(BV, 32), 8, 8, 1, 1)
    if BK > 128:
        return BackwardTiles(32, BK, min(BV, rows), 16, 8, 8, 1, 1)
    if BK < 128:
        return BackwardTiles(32, BK, min(BV, 32), min(BV, 64), 4, 4, 2, 2)
    stages = PACKED_STAGES.get(TRITON, 1) if gpu.is_tight and is_packed else 2
    return BackwardTiles(64, BK, min(BV, 64), min(BV, 64), 4, 8, 2, stages)


def rows_of_heads(H: int, HV: int) -> int:
    """``BR`` of the third stage."""
    return int(triton.next_power_of_2(HV // H))


def supports(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *_: object,
    **__: object,
) -> str | None:
    """Why a call cannot be served, in words for its caller; None where it can."""
    if q.dtype == torch.float64:
        return "the kernels compute in float32; q is float64"
    if g is not None and g.dim() == 4:
        return "the chunk kernels have one decay per head; g has one per key channel"
    return None


def _new_gradient(x: Tensor | None, like: Tensor) -> Tensor:
    """An unwritten gradient of ``x``, contiguous; an empty tensor where there is no ``x``."""
    return torch.empty_like(
        like.new_empty(0) if x is None else x, memory_format=torch.contiguous_format
    )


def _head_major(beta: Tensor) -> Tensor:
    """``beta`` in float32, the tokens of a head adjacent in rows of 16-byte multiples."""
    B, T, HV = beta.shape
    rows = beta.new_empty((B, HV, triton.cdiv(T, 4) * 4), dtype=torch.float32)
    rows = rows[..., :T].transpose(1, 2)
    return rows.copy_(beta)


def _use_descriptors(gpu: Gpu, *tensors: Tensor) -> bool:
    """Whether tokens may be read and written by tensor descriptors."""
    is_expanded = any(0 in x.stride() for x in tensors)
    is_reduced = tensors[0].dtype != torch.float32
    may_be_used = gpu.has_descriptors and is_reduced and not is_expanded
    return may_be_used and fits_descriptor(*tensors)


def chunk_backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.gdn.chunk_backward`` of checked arguments."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gpu = chunk._gpu_at(q.device.index)
    tiles = pick_backward(K, V, q.dtype, gpu, cu_seqlens is not None)
    BT = tiles.BT
    G, inverse, _ = prepare(
        *(q, k, HV, g, beta, cu_seqlens, use_qk_l2norm, BT, tiles.BK, gpu), is_scaled=False
    )
    places = chunk_places(B, T, BT, cu_seqlens)
    both_states = q.new_empty(2, places, HV, V, K)
    states, dstates = both_states
    writes = v.new_empty(2, B, T, HV, V)
    u, dr = writes
    dq, dk, dv, dg, dbeta, dinitial_state = (
        _new_gradient(x, q) for x in (q, k, v, g, beta, initial_state)
    )
    use_descriptors = _use_descriptors(gpu, q, k, v, do, states)
    if use_descriptors:
        # Both walks run beside each other; what they need for that is free behind the second.
        triton.set_allocator(Scratch())
        beta = None if beta is None else _head_major(beta)
    flags: dict[str, Any] = {
        "H": H,
        "HV": HV,
        "K": K,
        "V": V,
        "HAS_BETA": beta is not None,
        "IS_VARLEN": cu_seqlens is not None,
        "USE_QK_L2NORM": use_qk_l2norm,
        "DOT": DOT[q.dtype],
        "PRECISION": PRECISION,
        "BT": BT,
        "BK": tiles.BK,
        **OPTIONS,
    }
    scan = flags | {
        "HAS_INITIAL_STATE": initial_state is not None,
        "USE_DESCRIPTORS": use_descriptors,
        "USE_DESCRIPTOR_STORE": use_descriptors,
        "BV": tiles.BV_SCAN,
        "num_warps": tiles.warps_scan,
        "num_stages": tiles.stages_scan,
    }
    scale = K**-0.5 if scale is None else scale
    replay, to_replay = chunk_replay_kernel, scan
    reverse, to_reverse = chunk_reverse_kernel, scan
    walked = N
    is_hopper = serves_backward(do.dtype, q.dtype, K, V, use_descriptors, gpu)
    if is_hopper:
        walks = pick_walks(N, triton.cdiv(T, BT), HV, cu_seqlens is not None, gpu)
        walked = walks.walked
        forgets: dict[str, Any] = {"kept": None, "B": None}
        if walks.split != WHOLE:
            kept = bound_kept(k, HV, g, beta, None, use_qk_l2norm, BT, walks.split, at_starts=True)
            forgets = {"kept": kept, "B": B}
        replay, to_replay = walks.replay, scan | walks.of_replay | forgets
        reverse, to_reverse = walks.reverse, scan | walks.of_reverse | forgets
    rows = walked * HV * triton.cdiv(V, to_replay["BV"])
    replay[(rows,)](
        *(k, v, beta, initial_state, cu_seqlens, G, inverse, states, u),
        *k.stride(),
        *v.stride(),
        *strides(beta, 3),
        *strides(initial_state, 4),
        *strides(cu_seqlens, 1),
        *u.stride(),
        T,
        **to_replay,
    )
    reverse[(rows,)](
        *(do, dfinal_state, q, k, beta, cu_seqlens, G, inverse),
        *(dstates, dinitial_state, dr),
        *do.stride(),
        *strides(dfinal_state, 4),
        *q.stride(),
        *k.stride(),
        *strides(beta, 3),
        *strides(cu_seqlens, 1),
        *dr.stride(),
        T,
        scale=scale,
        HAS_DFINAL_STATE=dfinal_state is not None,
        **to_reverse,
    )
    if use_descriptors:
        triton.set_allocator(new_scratch)
    if is_hopper:
        launch_gradients(
            *(do, q, k, v, g, beta, cu_seqlens, G, both_states, writes, dq, dk, dv, dg, dbeta),
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
            gpu=gpu,
        )
        return dq, dk, dv, dg, dbeta, dinitial_state
    chunk_gradients_kernel[(places * H,)](
        *(do.contiguous(), q, k, v, beta, cu_seqlens, G, states, dstates, u, dr),
        *(dk, dv, dg, dbeta, dq),
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *strides(beta, 3),
        *strides(cu_seqlens, 1),
        *dq.stride(),
        T,
        scale=scale,
        HAS_G=g is not None,
        **flags,
        BV=tiles.BV_GRADIENTS,
        BR=rows_of_heads(H, HV),
        BN=PLACE_BN,
        num_warps=tiles.warps_gradients,
        num_stages=tiles.stages_gradients,
    )
    return dq, dk, dv, dg, dbeta, dinitial_state
