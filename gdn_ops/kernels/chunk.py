"""Launching the kernels of the chunked gated delta rule: prefill, and the forward of training.

Two kernels: ``prepare_kernel`` (chunk_prepare.py), parallel over chunks, and ``scan_kernel``
(chunk_scan.py), which walks them. Their shapes decide all; nothing is read on the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_prepare import prepare_kernel
from .chunk_scan import scan_kernel

# Tokens of a chunk. 128 need 40 % more arithmetic, 32 leave the tensor cores waiting.
_BT = 64


def supports(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *_: object) -> str | None:
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
    precision: str


def pick(K: int, V: int, dtype: torch.dtype) -> Tiles:
    """Tiles for heads of ``K`` and ``V``."""
    BK = max(16, triton.next_power_of_2(K))
    BV = min(64, max(16, triton.next_power_of_2(V)))
    if dtype == torch.float32:
        return Tiles(32 if BK > 128 else _BT, BK, min(BV, 32), 4, 1, "ieee")
    return Tiles(_BT, BK, BV, 8 if BK > 128 else 4, 1 if BK > 128 else 2, "ieee")


def _strides(x: Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides of a tensor, zero for dimensions that it does not have."""
    return (0,) * rank if x is None else x.stride()


def _new_scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _fits_descriptor(*tensors: Tensor) -> bool:
    """Whether every row of every head starts at a multiple of 16 bytes, its elements in order."""
    for x in tensors:
        size = x.element_size()
        b, t, h, d = x.stride()
        if d != 1 or (x.data_ptr() | b * size | t * size | h * size) % 16:
            return False
    return True


_DOT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Prepared(NamedTuple):
    """What ``prepare`` makes of the tokens."""

    G: Tensor
    q_scale: Tensor | None
    k_scale: Tensor | None
    inverse: Tensor


def prepare(
    q: Tensor,
    k: Tensor,
    HV: int,
    g: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor | None,
    use_qk_l2norm: bool,
    tiles: Tiles,
    is_scaled: bool = True,
) -> Prepared:
    """Launch ``prepare_kernel``."""
    B, T, H, K = k.shape
    wide = torch.float64 if k.dtype == torch.float32 else torch.float32
    TG = triton.cdiv(T, 4) * 4
    G = torch.empty((B, HV, TG), dtype=wide, device=k.device)
    q_scale = k_scale = None
    if use_qk_l2norm:
        q_scale, k_scale = torch.empty((2, B, H, TG), dtype=torch.float32, device=k.device)
    inverse = torch.empty((B, T, HV, tiles.BT), dtype=k.dtype, device=k.device)
    places = triton.cdiv(T, tiles.BT)
    places = B * places if cu_seqlens is None else places + cu_seqlens.shape[0] - 1
    prepare_kernel[(places * H,)](
        q,
        k,
        g,
        beta,
        cu_seqlens,
        G,
        q_scale,
        k_scale,
        inverse,
        *q.stride(),
        *k.stride(),
        *_strides(g, 3),
        *_strides(beta, 3),
        *_strides(cu_seqlens, 1),
        *inverse.stride(),
        T,
        0 if cu_seqlens is None else cu_seqlens.shape[0],
        H=H,
        HV=HV,
        K=K,
        HAS_G=g is not None,
        HAS_BETA=beta is not None,
        IS_VARLEN=cu_seqlens is not None,
        USE_QK_L2NORM=use_qk_l2norm,
        IS_SCALED=is_scaled,
        DOT=_DOT[k.dtype],
        PRECISION=tiles.precision,
        BT=tiles.BT,
        BK=tiles.BK,
        BN=128,
        num_warps=4,
        num_stages=2,
    )
    return Prepared(G, q_scale, k_scale, inverse)


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
    tiles = pick(K, V, q.dtype)
    prepared = prepare(q, k, HV, g, beta, cu_seqlens, use_qk_l2norm, tiles)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    N = B if cu_seqlens is None else cu_seqlens.shape[0]  # packed: one more, the tokens of none
    use_descriptors = q.is_cuda and _fits_descriptor(q, k, v)
    if use_descriptors:
        triton.set_allocator(_new_scratch)
    scan_kernel[(N * HV * triton.cdiv(V, tiles.BV),)](
        q,
        k,
        v,
        prepared.inverse,
        prepared.G,
        prepared.q_scale,
        prepared.k_scale,
        state,
        final_state,
        state_indices,
        has_initial_state,
        cu_seqlens,
        read_indices,
        o,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *_strides(state, 4),
        *final_state.stride(),
        *_strides(state_indices, 1),
        *_strides(has_initial_state, 1),
        *_strides(cu_seqlens, 1),
        *_strides(read_indices, 1),
        *o.stride(),
        T,
        scale=K**-0.5 if scale is None else scale,
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
        IS_VARLEN=cu_seqlens is not None,
        USE_QK_L2NORM=use_qk_l2norm,
        USE_DESCRIPTORS=use_descriptors,
        USE_DESCRIPTOR_STORE=use_descriptors and _fits_descriptor(o),
        INDEX=tl.int32 if o.numel() < 2**31 else tl.int64,
        DOT=_DOT[q.dtype],
        PRECISION=tiles.precision,
        BT=tiles.BT,
        BK=tiles.BK,
        BV=tiles.BV,
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
