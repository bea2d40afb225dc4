"""Gated delta rule in chunks: two kernels, ``prepare`` (chunk_prepare.py) and ``scan``.

A program of the scan owns ``BV`` rows of the state of one sequence and value head, transposed with
regard to most texts: ``S [V, K]``. It walks the chunks, and every product has its left operand in
registers, where the product before left it (columns are tokens):

    x  = v^T - exp(G) (S k^T)
    u  = x inverse^T                      what each token writes
    o  = (exp(G) (S q^T) + u P) scale     P_ij = exp(G_j - G_i) <k_i, q_j> for i <= j
    S' = exp(G_last) S + (exp(G_last - G) u) k

where ``inverse`` has beta folded into it. With USE_QK_L2NORM keys and queries come as they are, and
their norms are factors of tokens: those of k are in ``inverse`` and in ``x``, those of q in ``o``.

Tensors, beside those of the glossary and of chunk_prepare.py:

    state        read: the initial states, or the pool
    final_state  written: the final states, or with IS_POOL the pool once more

Tiles and flags: ``BT`` tokens of a chunk; ``BK >= K``; ``BV`` rows of a state; ``DOT`` the dtype of
operands; ``PRECISION`` the ``input_precision`` of float32 products; with USE_DESCRIPTORS tokens are
loaded by tensor descriptors, which needs rows of 16-byte multiples, the last dimension dense.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_prepare import decay_between, load_bounds, prepare_kernel
from .output import store_output

AXES = {
    "q": "bthk",
    "k": "bthk",
    "v": "bthv",
    "inverse": "bthj",
    "G": "bht",
    "q_scale": "bht",
    "k_scale": "bht",
    "state": "nhvk",
    "final_state": "nhvk",
    "state_indices": "n",
    "has_initial_state": "n",
    "cu_seqlens": "n",
    "read_indices": "n",
    "o": "bthv",
}
SIZES = {"T": "q_t"}


@triton.jit
def scan_kernel(
    q,
    k,
    v,
    inverse,
    G,
    q_scale,
    k_scale,
    state,
    final_state,
    state_indices,
    has_initial_state,
    cu_seqlens,
    read_indices,
    o,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_q_k,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_k_k,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_v_v,
    stride_state_n,
    stride_state_h,
    stride_state_v,
    stride_state_k,
    stride_final_state_n,
    stride_final_state_h,
    stride_final_state_v,
    stride_final_state_k,
    stride_state_indices_n,
    stride_has_initial_state_n,
    stride_cu_seqlens_n,
    stride_read_indices_n,
    stride_o_b,
    stride_o_t,
    stride_o_h,
    stride_o_v,
    T,
    scale: tl.constexpr,
    null_index: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    HAS_READ_INDICES: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    IS_POOL: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    USE_DESCRIPTOR_STORE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One sequence, value head and tile of V; the grid is ``N * HV * cdiv(V, BV)``.

    Packed rows have one more sequence: the tokens past the last, which are padding.
    """
    tl.static_assert(BK >= K)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_hv = tl.program_id(0) // NV % HV
    i_n = tl.program_id(0) // (NV * HV)
    i_h = i_hv // (HV // H)
    i_b = i_n.to(tl.int64)
    i_first = i_b * 0
    length = T
    is_live = True
    if IS_VARLEN:
        N = tl.num_programs(0) // (NV * HV) - 1
        is_live = i_n < N
        i_start, length = load_bounds(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        i_first = i_start.to(tl.int64)
        i_b = i_b * 0

    i_write = i_n.to(tl.int64)
    i_read = i_write
    if IS_POOL:
        i_row = tl.where(is_live, i_n, 0)
        if HAS_INDICES:
            i_write = tl.load(state_indices + i_row * stride_state_indices_n).to(tl.int64)
            i_read = i_write
        if HAS_READ_INDICES:
            i_read = tl.load(read_indices + i_row * stride_read_indices_n).to(tl.int64)
        is_live = is_live & (i_read > null_index) & (i_write > null_index) & (length > 0)
    # No token of padding is valid.
    valid = tl.where(is_live, length, 0)

    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_state = (o_v < V)[:, None] & (o_k < K)[None, :]
    b_S = tl.zeros((BV, BK), tl.float32)
    if HAS_STATE:
        m_read = is_live
        if HAS_INITIAL_STATE:
            m_read &= tl.load(has_initial_state + i_row * stride_has_initial_state_n) != 0
        p_state = state + i_read * stride_state_n + i_hv * stride_state_h
        p_state += o_v[:, None] * stride_state_v + o_k[None, :] * stride_state_k
        b_S = tl.load(p_state, m_state & m_read, 0.0).to(tl.float32)

    p_q = q + i_b * stride_q_b + i_first * stride_q_t + i_h * stride_q_h
    p_k = k + i_b * stride_k_b + i_first * stride_k_t + i_h * stride_k_h
    p_v = v + i_b * stride_v_b + i_first * stride_v_t + i_hv * stride_v_h
    p_inverse = inverse + ((i_b * T + i_first) * HV + i_hv) * BT
    p_G = G + (i_b * HV + i_hv) * T + i_first
    if USE_QK_L2NORM:
        p_q_scale = q_scale + (i_b * H + i_h) * T + i_first
        p_k_scale = k_scale + (i_b * H + i_h) * T + i_first
    # A descriptor ends where the sequence ends: what is past it reads as zero, and is not written.
    rows = tl.maximum(length, 1)
    if USE_DESCRIPTORS:
        d_q = tl.make_tensor_descriptor(p_q, [rows, K], [stride_q_t, 1], [BT, BK])
        d_k = tl.make_tensor_descriptor(p_k, [rows, K], [stride_k_t, 1], [BT, BK])
        d_v = tl.make_tensor_descriptor(p_v, [rows, V], [stride_v_t, 1], [BT, BV])
        d_inverse = tl.make_tensor_descriptor(p_inverse, [rows, BT], [HV * BT, 1], [BT, BT])
    if USE_DESCRIPTOR_STORE:
        p_o = o + i_b * stride_o_b + i_first * stride_o_t + i_hv * stride_o_h
        d_o = tl.make_tensor_descriptor(p_o, [rows, V], [stride_o_t, 1], [BT, BV])

    m_pairs = o_i[:, None] <= o_i[None, :]
    for i_t in range(tl.cdiv(length, BT)):
        o_t = i_t * BT + o_i
        m_t = o_t < valid
        if USE_DESCRIPTORS:
            # Past the end where no token is valid.
            i_row = tl.where(valid > 0, i_t * BT, length)
            b_k = d_k.load([i_row, 0])
            b_q = d_q.load([i_row, 0])
            b_v = d_v.load([i_row, i_v * BV])
            b_inverse = d_inverse.load([i_row, 0])
        else:
            o_row = o_t.to(tl.int64)[:, None]
            m_k = m_t[:, None] & (o_k < K)[None, :]
            b_k = tl.load(p_k + o_row * stride_k_t + o_k[None, :] * stride_k_k, m_k, 0.0)
            b_q = tl.load(p_q + o_row * stride_q_t + o_k[None, :] * stride_q_k, m_k, 0.0)
            m_v = m_t[:, None] & (o_v < V)[None, :]
            b_v = tl.load(p_v + o_row * stride_v_t + o_v[None, :] * stride_v_v, m_v, 0.0)
            b_inverse = tl.load(p_inverse + o_row * (HV * BT) + o_i[None, :], m_t[:, None], 0.0)
        # Tokens that are not valid are zero, and so is all that they give, if their decays are
        # finite: from the start 0, to each other 1, to the end 1.
        b_G = tl.load(p_G + o_t, m_t, -1e30) * 1.4426950408889634
        i_last = tl.minimum(i_t * BT + BT, valid) - 1
        b_last = tl.load(p_G + i_last, i_t * BT < valid, 0.0) * 1.4426950408889634
        b_decay = tl.exp2(b_G.to(tl.float32))
        b_tail = tl.exp2(tl.minimum(b_last - b_G, 0.0).to(tl.float32))
        b_k_decay = b_decay
        b_o_scale = scale
        if USE_QK_L2NORM:
            b_k_decay *= tl.load(p_k_scale + o_t, m_t, 0.0)
            b_o_scale = tl.load(p_q_scale + o_t, m_t, 0.0)[None, :] * scale

        b_Sd = b_S.to(DOT)
        b_x = tl.dot(b_Sd, tl.trans(b_k).to(DOT), input_precision=PRECISION)
        b_x = tl.trans(b_v).to(tl.float32) - b_x * b_k_decay[None, :]
        b_u = tl.dot(b_x.to(DOT), tl.trans(b_inverse).to(DOT), input_precision=PRECISION)
        b_P = tl.dot(b_k.to(DOT), tl.trans(b_q).to(DOT), input_precision=PRECISION)
        b_P *= decay_between(b_G[None, :], b_G[:, None], m_pairs)
        b_o = tl.dot(b_Sd, tl.trans(b_q).to(DOT), input_precision=PRECISION) * b_decay[None, :]
        b_o = tl.dot(b_u.to(DOT), b_P.to(DOT), b_o, input_precision=PRECISION) * b_o_scale
        b_S *= tl.exp2(b_last.to(tl.float32))
        b_u *= b_tail[None, :]
        b_S = tl.dot(b_u.to(DOT), b_k.to(DOT), b_S, input_precision=PRECISION)
        b_o = tl.trans(b_o)
        if USE_DESCRIPTOR_STORE:
            d_o.store([i_t * BT, i_v * BV], b_o.to(o.dtype.element_ty))
        else:
            store_output(
                o,
                (i_b, (i_first + o_t)[:, None], i_hv, o_v[None, :]),
                (stride_o_b, stride_o_t, stride_o_h, stride_o_v),
                b_o,
                (o_t < length)[:, None] & (o_v < V)[None, :],
            )

    p_final = final_state + i_write * stride_final_state_n + i_hv * stride_final_state_h
    p_final += o_v[:, None] * stride_final_state_v + o_k[None, :] * stride_final_state_k
    tl.store(p_final, b_S.to(final_state.dtype.element_ty), m_state & is_live)


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
    G = torch.empty((B, HV, T), dtype=wide, device=k.device)
    q_scale = k_scale = None
    if use_qk_l2norm:
        q_scale, k_scale = torch.empty((2, B, H, T), dtype=torch.float32, device=k.device)
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
