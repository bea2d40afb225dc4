"""Gated delta rule for a few tokens at once: verify with one write of the state.

    S <- exp(g_t) S ;  u_t = beta_t (v_t - S k_t) ;  S <- S + u_t k_t^T ;  o_t = scale S q_t

One token after the other this is bound by arithmetic, from four tokens on. Here the state is
multiplied once with all keys and queries, and the tokens are walked in what that gives, a number
for each key and query where the state has ``K``:

    X = S [k_0, k_1, ..., q_0, q_1, ...]
    X <- exp(g_t) X ;  u_t = beta_t (v_t - X[k_t]) ;  X[r] <- X[r] + u_t <k_t, r> ;  X[k_t] <- u_t

A column of ``q_t`` is left alone from then on, it is ``o_t``; a column of ``k_t`` decays with the
rest. So it ends as what the token adds to the state along ``k_t``, and no decay is a quotient:

    S <- exp(g_0 + g_1 + ...) S + X[k_0, k_1, ...] [k_0, k_1, ...]^T

Both products run on tensor cores and lose nothing that float32 keeps: an operand of float32 is the
sum of three bfloat16, without a remainder. Packed rows of more than ``BT`` tokens go by blocks.

A program, one warp, has ``BV`` rows of the state of one sequence and value head. Of 64 bytes of a
row a thread reads 16, and permuted channels make them what it must hold for a product. So the state
never passes through shared memory. It goes by slices of those ``KB`` channels, so that few
operands are alive at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_prepare import load_bounds
from .configs import VerifyTiles, cdiv
from .input import load_input
from .launch import launch, strides
from .norm import inverse_root
from .output import store_output

AXES = {
    "q": "bthk",
    "k": "bthk",
    "v": "bthv",
    "g": "bth",
    "beta": "bth",
    "state": "nhvk",
    "state_indices": "n",
    "cu_seqlens": "n",
    "read_indices": "n",
    "o": "bthv",
}
SIZES = {"T": "q_t"}


@triton.jit
def append(xs, x):
    """A tuple with one more."""
    return xs + (x,)  # noqa: RUF005 Triton does not unpack


@triton.jit
def split_exactly(b_x, PARTS: tl.constexpr):
    """``b_x`` as a sum of bfloat16: one for a bfloat16, two for a float16, three for a float32.

    Each part is cut off, 8 digits at a time, as an integer: conversions take a slow unit.
    """
    if b_x.dtype.is_bf16():
        return (b_x,)
    b_x = b_x.to(tl.float32)
    parts = ()
    for _ in tl.static_range(PARTS):
        b_bits = b_x.to(tl.int32, bitcast=True)
        parts = append(parts, (b_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True))
        b_x -= (b_bits & -0x10000).to(tl.float32, bitcast=True)
    return parts


@triton.jit
def multiply_parts(x, y, b_xy):
    """``b_xy`` plus the product of two sums, small terms first, without those below float32."""
    for i in tl.static_range(2, -1, -1):
        for j in tl.static_range(len(x)):
            if j <= i and i - j < len(y):
                b_xy = tl.dot(x[j], y[i - j], b_xy)
    return b_xy


@triton.jit
def spread_channels(b_x, IS_TRANSPOSED: tl.constexpr = False):
    """``[n, KB]`` with the channels in the order in which an operand has them, or ``[KB, n]``."""
    n: tl.constexpr = b_x.shape[0]
    KB: tl.constexpr = b_x.shape[1]
    b_x = tl.reshape(b_x, (n, 4, KB // 8, 2))
    if IS_TRANSPOSED:  # Triton 3.8 does a tl.trans of its own in shared memory
        return tl.reshape(tl.permute(b_x, (2, 1, 3, 0)), (KB, n))
    else:  # noqa: RET505 one type a branch
        return tl.reshape(tl.permute(b_x, (0, 2, 1, 3)), (n, KB))


@triton.jit
def collect_channels(b_x):
    """The reverse of ``spread_channels``."""
    n: tl.constexpr = b_x.shape[0]
    KB: tl.constexpr = b_x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(b_x, (n, KB // 8, 4, 2)), (0, 2, 1, 3)), (n, KB))


@triton.jit
def walk_token(b_x, b_G, b_v, b_decay, b_beta, i, BT: tl.constexpr):
    """``X`` after token ``i`` of ``BT``; one that is none has zeros for key, value and decay.

    Args:
        b_x: Products of the state with keys and queries, ``[BV, BR]``.
        b_G: Those of keys and queries with each other, ``[BR, BR]``.
    """
    o_r = tl.arange(0, b_x.shape[1])
    b_u = b_v - b_decay * tl.sum(tl.where(o_r[None, :] == i, b_x, 0.0), 1)
    b_u *= b_beta
    # Later tokens, and the output of this one; outputs of earlier ones are done.
    b_row = tl.sum(tl.where(o_r[:, None] == i, b_G, 0.0), 0)
    b_row = tl.where((o_r > i) & ((o_r < BT) | (o_r >= BT + i)), b_row, 0.0)
    b_row = tl.where(o_r == i, 1.0, b_row)
    b_keep = tl.where((o_r >= BT) & (o_r < BT + i), 1.0, b_decay)
    b_keep = tl.where(o_r == i, 0.0, b_keep)
    return b_x * b_keep[None, :] + b_u[:, None] * b_row[None, :]


@triton.jit
def recurrent_verify_kernel(
    q,
    k,
    v,
    g,
    beta,
    state,
    state_indices,
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
    stride_g_b,
    stride_g_t,
    stride_g_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    stride_state_n,
    stride_state_h,
    stride_state_indices_n,
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
    USE_QK_L2NORM: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    HAS_READ_INDICES: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    STATE_PARTS: tl.constexpr,
    TOKEN_PARTS: tl.constexpr,
    UPDATE_PARTS: tl.constexpr,
    EARLY: tl.constexpr,  # all loads of tokens come before the first product
    BT: tl.constexpr,
    BR: tl.constexpr,  # rows of the operand of keys and queries
    BK: tl.constexpr,
    KB: tl.constexpr,
    BV: tl.constexpr,
):
    tl.static_assert(BK >= K and BK % KB == 0 and BR >= 2 * BT)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_hv = tl.program_id(0) // NV % HV
    i_n = tl.program_id(0) // NV // HV
    i_h = i_hv // (HV // H)

    # The tokens of the sequence.
    i_b = i_n.to(tl.int64)
    i_start = 0
    L = T
    is_live = L > 0
    i_row = i_n
    if IS_VARLEN:
        i_b = i_b * 0
        N = tl.num_programs(0) // (NV * HV) - 1
        i_start, L = load_bounds(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        is_live = (i_n < N) & (L > 0)
        i_row = tl.where(i_n < N, i_n, 0)

    # The slots that it reads and writes; what is not live reads slot 0, masked.
    i_write = i_row.to(tl.int64)
    if HAS_INDICES:
        i_write = tl.load(state_indices + i_row * stride_state_indices_n).to(tl.int64)
    i_read = i_write
    if HAS_READ_INDICES:
        i_read = tl.load(read_indices + i_row * stride_read_indices_n).to(tl.int64)
    is_live = is_live & (i_read > null_index) & (i_write > null_index)
    i_read = tl.where(is_live, i_read, 0)
    i_write = tl.where(is_live, i_write, 0)

    # The tile of the state, in slices of KB channels.
    o_k = tl.arange(0, KB)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    m_s = m_v[:, None] & is_live
    o_s = i_hv * stride_state_h + o_v[:, None] * K + o_k[None, :]
    p_s = state + i_read * stride_state_n + o_s
    s = ()
    for i in tl.static_range(BK // KB):
        b_s = tl.load(p_s + i * KB, m_s & (i * KB + o_k < K)[None, :], 0.0)
        s = append(s, spread_channels(b_s).to(tl.float32))
    if EARLY:
        # No load of a token comes before: ptxas would put them between those of the state.
        tl.debug_barrier()

    # Rows of keys, then of queries, then of nothing.
    o_r = tl.arange(0, BR)
    is_key = o_r < BT
    is_query = (o_r >= BT) & (o_r < 2 * BT)
    p_k = k + i_b * stride_k_b + i_h * stride_k_h + o_k[None, :] * stride_k_k
    p_q = q + i_b * stride_q_b + i_h * stride_q_h + o_k[None, :] * stride_q_k
    p_v = v + i_b * stride_v_b + i_hv * stride_v_h + o_v * stride_v_v
    for i_first in range(0, L if IS_VARLEN else 1, BT):
        o_first = i_b * 0 + i_start + i_first  # int64
        if EARLY:
            o_i = tl.arange(0, BT)
            m_i = i_first + o_i < L
            o_x = o_first + o_i
            b_gs = tl.zeros((BT,), tl.float32)
            if HAS_G:
                b_gs = load_input(g, (i_b, o_x, i_hv), (stride_g_b, stride_g_t, stride_g_h), m_i)
            b_betas = tl.full((BT,), 1.0, tl.float32)
            if HAS_BETA:
                b_betas = load_input(
                    beta, (i_b, o_x, i_hv), (stride_beta_b, stride_beta_t, stride_beta_h), m_i
                )
            b_decays = tl.exp(b_gs)
            b_total = tl.exp(tl.sum(b_gs))
            vs = ()
            for i in tl.static_range(BT):
                p_x = p_v + (o_first + i) * stride_v_t
                vs = append(vs, tl.load(p_x, m_v & (i_first + i < L), 0.0))
        else:
            b_total = 1.0
        m_t = i_first + o_r % BT < L
        o_t = o_first + o_r % BT
        b_G = tl.zeros((BR, BR), tl.float32)
        b_x = tl.zeros((BV, BR), tl.float32)
        kqs = ()
        for i in tl.static_range(BK // KB):
            m_k = (i * KB + o_k < K)[None, :]
            # A thread loads the channels that it has of the state, and no more.
            p_x = p_k + i * KB * stride_k_k + o_t[:, None] * stride_k_t
            p_x = tl.max_contiguous(p_x, [1, KB // 4])
            b_kq = tl.load(p_x, (m_t & is_key)[:, None] & m_k, 0.0)
            p_x = p_q + i * KB * stride_q_k + o_t[:, None] * stride_q_t
            p_x = tl.max_contiguous(p_x, [1, KB // 4])
            b_kq = tl.load(p_x, (m_t & is_query)[:, None] & m_k, b_kq)
            kqs = append(kqs, b_kq)
        for i in tl.static_range(BK // KB):
            kq = split_exactly(spread_channels(kqs[i]), TOKEN_PARTS)
            kq_t = split_exactly(spread_channels(kqs[i], True), TOKEN_PARTS)
            b_G = multiply_parts(kq, kq_t, b_G)
            b_x = multiply_parts(split_exactly(s[i], STATE_PARTS), kq_t, b_x)
        b_scale = tl.where(is_query, scale, 1.0)
        if USE_QK_L2NORM:
            m_same = o_r[:, None] == o_r[None, :]
            b_norm = inverse_root(tl.sum(tl.where(m_same, b_G, 0.0), 0))
            b_scale *= b_norm
            b_G *= inverse_root(tl.sum(tl.where(m_same, b_G, 0.0), 1))[:, None]
        b_G *= b_scale[None, :]
        b_x *= b_scale[None, :]

        for i in tl.static_range(BT):
            if not EARLY:
                m_i = i_first + i < L
                i_t = o_first + i
                b_g = 0.0
                b_beta = 1.0
                b_v = tl.load(p_v + i_t * stride_v_t, m_v & m_i, 0.0)
                if HAS_G:
                    b_g = load_input(g, (i_b, i_t, i_hv), (stride_g_b, stride_g_t, stride_g_h), m_i)
                if HAS_BETA:
                    b_beta = load_input(
                        beta, (i_b, i_t, i_hv), (stride_beta_b, stride_beta_t, stride_beta_h), m_i
                    )
                b_decay = tl.exp(b_g)
                b_total *= b_decay
            else:
                b_v = vs[i]
                b_decay = tl.sum(tl.where(o_i == i, b_decays, 0.0))
                b_beta = tl.sum(tl.where(o_i == i, b_betas, 0.0))
            b_x = walk_token(b_x, b_G, b_v.to(tl.float32), b_decay, b_beta, i, BT)
        store_output(
            o,
            (i_b, o_t[None, :], i_hv, o_v[:, None]),
            (stride_o_b, stride_o_t, stride_o_h, stride_o_v),
            tl.where(is_live, b_x, 0.0),
            (m_t & is_query)[None, :] & m_v[:, None],
        )

        if USE_QK_L2NORM:
            b_x *= b_norm[None, :]
        u = split_exactly(tl.where(is_key[None, :], b_x, 0.0), UPDATE_PARTS)
        s_new = ()
        for i in tl.static_range(BK // KB):
            b_k = spread_channels(tl.where(is_key[:, None], kqs[i], 0.0))
            keys = split_exactly(b_k, TOKEN_PARTS)
            s_new = append(s_new, multiply_parts(u, keys, s[i] * b_total))
        s = s_new
    p_s = state + i_write * stride_state_n + o_s
    for i in tl.static_range(BK // KB):
        b_s = collect_channels(s[i]).to(state.dtype.element_ty)
        tl.store(p_s + i * KB, b_s, m_s & (i * KB + o_k < K)[None, :])


def recurrent_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    read_indices: Tensor | None,
    tiles: VerifyTiles,
    *,
    scale: float | None,
    use_qk_l2norm: bool,
    null_index: int,
) -> Tensor:
    """``torch.ops.gdn.recurrent_`` of checked arguments, without a table and not exact."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    N = B if cu_seqlens is None else cu_seqlens.shape[0]  # packed: one more, the tokens of none
    slots = (state_indices, cu_seqlens, read_indices)
    numbers = (
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *strides(g, 3),
        *strides(beta, 3),
        *state.stride()[:2],
        *strides(state_indices, 1),
        *strides(cu_seqlens, 1),
        *strides(read_indices, 1),
        *o.stride(),
        T,
    )
    launch(
        recurrent_verify_kernel,
        N * HV * cdiv(V, tiles.BV),
        (q, k, v, g, beta, state, *slots, o),
        numbers,
        tiles.num_warps,
        1,
        scale=K**-0.5 if scale is None else scale,
        null_index=null_index,
        H=H,
        HV=HV,
        K=K,
        V=V,
        USE_QK_L2NORM=use_qk_l2norm,
        HAS_G=g is not None,
        HAS_BETA=beta is not None,
        HAS_INDICES=state_indices is not None,
        HAS_READ_INDICES=read_indices is not None,
        IS_VARLEN=cu_seqlens is not None,
        STATE_PARTS=tiles.STATE_PARTS,
        TOKEN_PARTS=tiles.TOKEN_PARTS,
        UPDATE_PARTS=tiles.UPDATE_PARTS,
        EARLY=tiles.EARLY,
        BT=tiles.BT,
        BR=tiles.BR,
        BK=tiles.BK,
        KB=tiles.KB,
        BV=tiles.BV,
    )
    return o
