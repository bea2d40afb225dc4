"""What a chunk is, apart from states and values: its decays and its triangular inverse.

For the tokens i, j of a chunk, with the cumulated log decay ``G`` from the start of the chunk,

    A_ij = beta_i exp(G_i - G_j) <k_i, k_j>   for j < i
    X    = (I + A)^-1

One program serves a chunk and a key head, for all value heads that read the key head: ``K K^T`` is
the same for them. A chunk is aligned to the start of its sequence.

Chunks have places, the first dimension of what is stored for each: in a batch ``cdiv(T, BT)`` for a
sequence; of packed sequences, number n has the places from ``cu_seqlens[n] // BT + n`` on. They are
at least as many as its chunks, ``cdiv(T, BT) + N`` in all, and no other length need be known.

Tensors, beside those of the glossary (gdn_ops/README.md); what is made here is contiguous:

    G        [places, HV, ROWS, BT]  log decays, natural logarithm, zero past the sequence: the
                             cumulated one; with USE_QK_L2NORM also its sums with log q_scale and
                             log k_scale, where x_scale = rsqrt(sum(x * x) + 1e-6). ROWS is 1 or 3.
                             float64 where the inputs are float32: ``G`` reaches hundreds, and exp
                             of a float32 difference of two such sums is off by an order of
                             magnitude more than the token loop
    inverse  [B, T, HV, BT]    the main output: row i of X of its chunk, and with IS_SCALED of
                               diag(k_scale) X diag(beta), so that a scan needs neither beta nor
                               normalised keys. Rows past cu_seqlens[-1] belong to no chunk and
                               stay unwritten

Tiles and flags: ``BT`` tokens of a chunk, 16, 32 or 64; ``BK >= K``; ``BN`` bounds read at once;
``DOT`` the dtype of the products of keys; ``PRECISION`` the ``input_precision`` of float32
products.
"""

import triton
import triton.language as tl

from .norm import inverse_norm
from .output import store_output

AXES = {
    "q": "bthk",
    "k": "bthk",
    "g": "bth",
    "beta": "bth",
    "cu_seqlens": "n",
    "G": "chrt",
    "inverse": "bthj",
}
SIZES = {"T": "k_t"}


@triton.jit
def load_bounds(cu_seqlens, i_n, stride_cu_seqlens_n, N, T):
    """First token and length of sequence ``i_n``; sequence ``N`` is what follows the last.

    A bound past ``T`` counts as ``T``.
    """
    p_n = cu_seqlens + i_n * stride_cu_seqlens_n
    i_next = tl.where(i_n < N, stride_cu_seqlens_n, 0)
    i_start = tl.minimum(tl.load(p_n).to(tl.int32), T)
    i_end = tl.where(i_n < N, tl.minimum(tl.load(p_n + i_next).to(tl.int32), T), T)
    return i_start, tl.maximum(i_end - i_start, 0)


@triton.jit
def find_chunk(cu_seqlens, i_c, stride_cu_seqlens_n, N, BT: tl.constexpr, BN: tl.constexpr):
    """The sequence of place ``i_c``, and its chunk in it: past its end in a place left over."""
    i_n = -1
    for i_block in range(0, N, BN):
        o_n = i_block + tl.arange(0, BN)
        b_start = tl.load(cu_seqlens + o_n * stride_cu_seqlens_n, o_n < N, 0).to(tl.int32)
        i_n += tl.sum(((b_start // BT + o_n <= i_c) & (o_n < N)).to(tl.int32), 0)
    i_start = tl.load(cu_seqlens + i_n * stride_cu_seqlens_n).to(tl.int32)
    return i_n, i_c - (i_start // BT + i_n)


@triton.jit
def decay_between(b_G_to, b_G_from, m_valid):
    """``2 ** (b_G_to - b_G_from)``, zero outside the mask, which comes before the power."""
    return tl.exp2(tl.where(m_valid, b_G_to - b_G_from, float("-inf")).to(tl.float32))


@triton.jit
def diagonal_pairs(a):
    """The diagonal blocks of ``[G, 2 n, 2 n]``, stacked, ``[2 G, n, n]``, and the lower ones."""
    n: tl.constexpr = a.shape[1] // 2
    blocks = tl.permute(tl.reshape(a, (a.shape[0], 2, n, 2, n)), (0, 2, 4, 3, 1))
    upper, lower = tl.split(blocks)  # [G, n, n, 2]
    a00, _ = tl.split(upper)
    a10, a11 = tl.split(lower)
    stacked = tl.permute(tl.join(a00, a11), (3, 0, 1, 2))
    return tl.reshape(stacked, (2 * a.shape[0], n, n)), a10


@triton.jit
def unstack_pair(xy):
    """The two halves of a stack ``[2 G, n, n]``."""
    pair = tl.reshape(xy, (2, xy.shape[0] // 2, xy.shape[1], xy.shape[2]))
    return tl.split(tl.permute(pair, (1, 2, 3, 0)))


@triton.jit
def join_lower(x00, x10, x11):
    """``[G, 2 n, 2 n]`` of its three lower blocks, the upper one zero."""
    n: tl.constexpr = x00.shape[1]
    columns = tl.join(tl.join(x00, tl.zeros_like(x00)), tl.join(x10, x11))  # [G, n, n, 2, 2]
    return tl.reshape(tl.permute(columns, (0, 4, 1, 3, 2)), (x00.shape[0], 2 * n, 2 * n))


@triton.jit
def multiply_blocks(x, y, PRECISION: tl.constexpr):
    """Products of ``[G, n, n]``."""
    n: tl.constexpr = x.shape[1]
    if n < 16:
        xy = tl.sum(x[:, :, :, None] * y[:, None, :, :], 2)
    elif x.shape[0] == 1:
        xy = tl.dot(tl.reshape(x, (n, n)), tl.reshape(y, (n, n)), input_precision=PRECISION)
        xy = tl.reshape(xy, (1, n, n))
    else:
        xy = tl.dot(x, y, input_precision=PRECISION)
    return xy


@triton.jit
def invert_four(b_A, PRECISION: tl.constexpr):
    """``(I + A)^-1`` of strictly lower ``[G, 4, 4]``, ``(I - A) (I + A A)`` as ``A^4 = 0``."""
    o_i = tl.arange(0, 4)
    b_I = tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0)[None, :, :]
    return multiply_blocks(b_I - b_A, b_I + multiply_blocks(b_A, b_A, PRECISION), PRECISION)


@triton.jit
def merge_blocks(b_X, b_A10, PRECISION: tl.constexpr):
    """From the inverses of two diagonal blocks, stacked, that of the block made of both."""
    x00, x11 = unstack_pair(b_X)
    x10 = multiply_blocks(multiply_blocks(x11, b_A10, PRECISION), x00, PRECISION)
    return join_lower(x00, -x10, x11)


@triton.jit
def invert_chunk(b_A, BT: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + A)^-1`` of strictly lower ``[BT, BT]``: blocks of 4, then merges of two.

    Merging is stable. Powers of the whole of A, the other way without a loop, cancel: they reach
    thousands where the keys of a chunk are alike.
    """
    b_D = tl.reshape(b_A, (1, BT, BT))
    if BT == 64:
        b_D, b_A32 = diagonal_pairs(b_D)
    if BT >= 32:
        b_D, b_A16 = diagonal_pairs(b_D)
    b_D, b_A8 = diagonal_pairs(b_D)
    b_D, b_A4 = diagonal_pairs(b_D)
    b_X = invert_four(b_D, PRECISION)
    b_X = merge_blocks(b_X, b_A4, PRECISION)
    b_X = merge_blocks(b_X, b_A8, PRECISION)
    if BT >= 32:
        b_X = merge_blocks(b_X, b_A16, PRECISION)
    if BT == 64:
        b_X = merge_blocks(b_X, b_A32, PRECISION)
    return tl.reshape(b_X, (BT, BT))


@triton.jit
def prepare_kernel(
    q,
    k,
    g,
    beta,
    cu_seqlens,
    G,
    inverse,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_q_k,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_k_k,
    stride_g_b,
    stride_g_t,
    stride_g_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    stride_cu_seqlens_n,
    stride_inverse_b,
    stride_inverse_t,
    stride_inverse_h,
    stride_inverse_j,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_BETA: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    IS_SCALED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """One chunk of one key head; the grid is ``places * H``."""
    tl.static_assert(BK >= K and (BT == 16 or BT == 32 or BT == 64))
    R: tl.constexpr = HV // H
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    if IS_VARLEN:
        N = tl.num_programs(0) // H - tl.cdiv(T, BT)
        i_n, i_chunk = find_chunk(cu_seqlens, i_c, stride_cu_seqlens_n, N, BT, BN)
        i_start, length = load_bounds(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        i_b = i_c.to(tl.int64) * 0
    else:
        i_chunk = i_c % tl.cdiv(T, BT)
        i_b = (i_c // tl.cdiv(T, BT)).to(tl.int64)
        i_start = 0
        length = T
    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_t = i_chunk * BT + o_i < length
    o_t = (i_start + i_chunk * BT + o_i).to(tl.int64)
    m_k = m_t[:, None] & (o_k < K)[None, :]

    p_k = k + i_b * stride_k_b + o_t[:, None] * stride_k_t + i_h * stride_k_h + o_k * stride_k_k
    b_k = tl.load(p_k, m_k, 0.0).to(DOT)
    b_KK = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    if USE_QK_L2NORM:
        p_q = q + i_b * stride_q_b + o_t[:, None] * stride_q_t + i_h * stride_q_h + o_k * stride_q_k
        b_q = tl.load(p_q, m_k, 0.0).to(tl.float32)
        b_q_scale = inverse_norm(b_q)
        b_k_scale = inverse_norm(b_k.to(tl.float32))
        b_KK *= b_k_scale[:, None] * b_k_scale[None, :]
    ROWS: tl.constexpr = 3 if USE_QK_L2NORM else 1

    m_lower = o_i[:, None] > o_i[None, :]
    for i_r in range(tl.where(i_chunk * BT < length, R, 0)):
        i_hv = i_h * R + i_r
        if HAS_G:
            p_g = g + i_b * stride_g_b + o_t * stride_g_t + i_hv * stride_g_h
            b_g = tl.load(p_g, m_t, 0.0).to(G.dtype.element_ty)
            # exp of this is zero in float32. Beyond it, sums would only lose digits, or be NaN.
            b_G = tl.cumsum(tl.where(b_g < -104.0, -104.0, b_g), 0)
        else:
            b_G = tl.zeros((BT,), G.dtype.element_ty)
        p_G = G + (i_c.to(tl.int64) * HV + i_hv) * (ROWS * BT) + o_i
        tl.store(p_G, tl.where(m_t, b_G, 0.0))
        if USE_QK_L2NORM:
            b_Gq = b_G + tl.log(b_q_scale.to(b_G.dtype))
            b_Gk = b_G + tl.log(b_k_scale.to(b_G.dtype))
            tl.store(p_G + BT, tl.where(m_t, b_Gq, 0.0))
            tl.store(p_G + 2 * BT, tl.where(m_t, b_Gk, 0.0))
        b_G *= 1.4426950408889634
        b_A = b_KK * decay_between(b_G[:, None], b_G[None, :], m_lower)
        if HAS_BETA:
            p_beta = beta + i_b * stride_beta_b + o_t * stride_beta_t + i_hv * stride_beta_h
            b_beta = tl.load(p_beta, m_t, 0.0).to(tl.float32)
            b_A *= b_beta[:, None]
        b_X = invert_chunk(b_A, BT, PRECISION)
        if IS_SCALED and HAS_BETA:
            b_X *= b_beta[None, :]
        if IS_SCALED and USE_QK_L2NORM:
            b_X *= b_k_scale[:, None]
        store_output(
            inverse,
            (i_b, o_t[:, None], i_hv, o_i[None, :]),
            (stride_inverse_b, stride_inverse_t, stride_inverse_h, stride_inverse_j),
            b_X,
            m_t[:, None] & (o_i < BT)[None, :],
        )
