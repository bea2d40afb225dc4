"""Launching the kernels of the chunked gated delta rule: prefill, and the forward of training.

Two kernels: ``prepare_kernel`` (chunk_prepare.py), parallel over chunks, and ``scan_kernel``
(chunk_scan.py, or its twin for Hopper), which walks them; or one on Hopper (chunk_fused.py). Shapes
decide all, no data are read.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_beside import begin, pick_limit
from .chunk_fused import is_faster, launch_fused
from .chunk_hopper import pick_scan, serves
from .chunk_prepared import DOT, PRECISION, prepare
from .chunk_scan import scan_kernel
from .chunk_segments import WHOLE, bound_kept, choose, enter_segments
from .configs import SCAN_BV, Gpu, cdiv, gpu_at, next_power_of_2
from .launch import fits_descriptor, launch, strides
from .plan import new_scratch


def supports(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *_: object, **__: object
) -> str | None:
    """Why a call cannot be served, in words for its caller; None where it can."""
    if q.dtype == torch.float64:
        return "the kernels compute in float32; q is float64"
    if g is not None and g.dim() == 4:
        return "the chunk kernels have one decay per head; g has one per key channel"
    return None


class Tiles(NamedTuple):
    """Tiles of the two kernels, and how they are launched."""

    BT: int
    BK: int
    BV: int
    num_warps: int
    num_stages: int


# Chunks of 128 tokens need 40 % more arithmetic, of 32 leave tensor cores waiting. At K = 128 on
# sm_90 the scan's loop has 640 instructions and spills nothing, and two programs share a
# multiprocessor at 2 stages. At K = 256 a thread of 4 warps would need more than 255 registers, and
# on AMD's GPUs, which have 512, one of 8 warps would spill. The shared memory fits every GPU since
# sm_80 and gfx942 (cross-compiled, Triton 3.6.0 and 3.7.1, 2026-11-24). float32 is multiplied
# without tensor cores: its tiles are those that spill least. Where there are more
# heads than multiprocessors, eight warps that own 128 rows read tokens once: 4 sequences of 8192
# tokens take 287 us with them and 350 with two programs of four warps (H200, 2026-11-24; through
# pointers not measured).
def pick(
    K: int, V: int, dtype: torch.dtype, heads: int, gpu: Gpu, use_descriptors: bool = False
) -> Tiles:
    """Tiles for ``heads`` states of ``[V, K]``; whether tokens come and go by descriptors."""
    is_amd = gpu.arch.startswith("gfx")
    BK = max(16, next_power_of_2(K))
    BV = min(SCAN_BV.get(gpu.arch, 64), max(16, next_power_of_2(V)))
    if dtype == torch.float32:
        return Tiles(32 if BK <= 128 else 16, BK, min(32, BV), 8, 1)
    if BK < 64:
        # Of 64 rows the last product would be one of a warp group, with an operand that is too
        # narrow for it: https://github.com/triton-lang/triton/issues/11366. Of 32 rows it spills.
        BV = 16
    if BK > 128:
        return Tiles(64, BK, 32, 8, 2) if gpu.is_tight else Tiles(64, BK, BV, 4 if is_amd else 8, 1)
    # A program that has a multiprocessor for itself has its memory too, since sm_90 enough.
    if heads * cdiv(V, BV) <= gpu.multiprocessors and gpu.has_descriptors:
        return Tiles(64, BK, BV, 4, 3)
    if use_descriptors and gpu.arch == "sm_90" and BK >= 64 and V > 64:
        return Tiles(64, BK, 128, 8, 3)
    # On gfx942 two stages are 34 spills in the loop with Triton 3.6.0, with 3.7.1 none.
    return Tiles(64, BK, BV, 4, 1 if is_amd else 2)


def stores_late(tiles: Tiles, gpu: Gpu) -> bool:
    """Whether the output is stored a chunk later, by a descriptor, where the call allows it.

    Its tile is the shared memory that a second program would lack, and elsewhere it spills.
    """
    return gpu.arch == "sm_90" and tiles.num_stages > 2


_gpu_at = functools.cache(gpu_at)


def _launch(
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
    scale: float | None,
    use_qk_l2norm: bool,
    null_index: int,
) -> Tensor:
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0]  # packed: one more, the tokens of none
    is_packed = cu_seqlens is not None
    gpu = _gpu_at(q.device.index)
    # Descriptors are of use where tensor cores read what they load.
    use_descriptors = gpu.has_descriptors and q.dtype != torch.float32 and fits_descriptor(q, k, v)
    if use_descriptors:
        triton.set_allocator(new_scratch)
    scale = K**-0.5 if scale is None else scale
    if T and use_descriptors and is_faster(K, V, q.dtype, (N - is_packed) * HV, gpu):
        return launch_fused(
            *(q, k, v, g, beta, state, final_state),
            *(state_indices, has_initial_state, cu_seqlens, read_indices),
            is_pool=is_pool,
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
            null_index=null_index,
        )
    tiles = pick(K, V, q.dtype, N * HV, gpu, use_descriptors)
    chunks = B * cdiv(T, tiles.BT)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    is_late = use_descriptors and stores_late(tiles, gpu) and fits_descriptor(o)
    limit = pick_limit(N - is_packed, chunks, HV, K, V, gpu) if is_late else 0
    split = choose(
        *(N - is_packed, chunks, HV, V, tiles.BK, tiles.BV, q.dtype, gpu),
        needs_maps=is_pool or is_packed,
        is_beside=limit > 0,
    )
    kept = None
    if split != WHOLE:
        kept = bound_kept(k, HV, g, beta, cu_seqlens, use_qk_l2norm, tiles.BT, split)
    beside = None
    if limit and not split.has_maps:
        beside = begin(limit, kept, k, HV, cu_seqlens, tiles.BT, split)
    G, inverse, weights = prepare(
        *(q, k, HV, g, beta, cu_seqlens, use_qk_l2norm, tiles.BT, tiles.BK, gpu),
        starts_next=serves(K, V, gpu),
        beside=beside,
    )
    constants = {
        "USE_QK_L2NORM": use_qk_l2norm,
        "USE_DESCRIPTORS": use_descriptors,
        "DOT": DOT[q.dtype],
        "PRECISION": PRECISION,
    }
    walked, segment_states = N, None
    if kept is not None and split.has_maps:
        segment_states = enter_segments(
            *(k, v, inverse, G, kept, state),
            *(state_indices, has_initial_state, cu_seqlens, read_indices),
            null_index=null_index,
            split=split,
            tiles=tiles,
            constants=constants,
            gpu=gpu,
        )
    if split != WHOLE:
        walked = B * split.places(T, B, tiles.BT, N - 1 if is_packed else None) + is_packed
    scan, tiles, options = pick_scan(tiles, K, V, walked * HV, gpu, is_late)
    done: tuple[Tensor | None, ...] = ()
    if scan is not scan_kernel:
        done = (None if beside is None else beside.done,)
        options["HAS_DONE"] = beside is not None
    launch(
        scan,
        walked * HV * cdiv(V, tiles.BV),
        (
            q,
            k,
            v,
            inverse,
            weights,
            G,
            None if is_packed else kept,
            state,
            segment_states,
            final_state,
            state_indices,
            has_initial_state,
            cu_seqlens,
            read_indices,
            o,
            *done,
        ),
        (
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *strides(state, 4),
            *final_state.stride(),
            *strides(state_indices, 1),
            *strides(has_initial_state, 1),
            *strides(cu_seqlens, 1),
            *strides(read_indices, 1),
            *o.stride(),
            T,
            None if split == WHOLE else B,
        ),
        scale=scale,
        null_index=null_index,
        H=H,
        HV=HV,
        K=K,
        V=V,
        HAS_STATE=state is not None,
        HAS_INDICES=state_indices is not None,
        HAS_READ_INDICES=read_indices is not None,
        HAS_INITIAL_STATE=has_initial_state is not None,
        IS_POOL=is_pool,
        IS_VARLEN=is_packed,
        HAS_KEPT=kept is not None and not is_packed,
        HAS_SEGMENT_STATES=split.has_maps,
        USE_DESCRIPTOR_STORE=is_late,
        STORES_FIRST=gpu.is_tight,
        INDEX=tl.int32 if o.numel() < 2**31 else tl.int64,
        BT=tiles.BT,
        BK=tiles.BK,
        BV=tiles.BV,
        **constants,
        **split.constants(),
        **options,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return o


def chunk(
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
) -> tuple[Tensor, Tensor]:
    """``torch.ops.gdn.chunk`` of checked arguments."""
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    shape = (N, v.shape[2], v.shape[3], q.shape[3])
    final_state = torch.empty(shape, dtype=dtype, device=q.device)
    tensors = (q, k, v, g, beta, initial_state, final_state, None, None, cu_seqlens, None)
    o = _launch(*tensors, is_pool=False, scale=scale, use_qk_l2norm=use_qk_l2norm, null_index=-1)
    return o, final_state


def chunk_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    read_indices: Tensor | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    null_index: int = -1,
) -> Tensor:
    """``torch.ops.gdn.chunk_`` of checked arguments."""
    return _launch(
        q,
        k,
        v,
        g,
        beta,
        state,
        state,
        state_indices,
        has_initial_state,
        cu_seqlens,
        read_indices,
        is_pool=True,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        null_index=null_index,
    )
