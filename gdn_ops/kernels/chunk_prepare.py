"""What a chunk is, apart from states and values: its decays and its triangular inverse.

For the tokens i, j of a chunk, with the cumulated log decay ``G`` from the start of the chunk,

    D_ij = exp(G_i - G_j)                      for j <= i
    A_ij = beta_i D_ij <k_i, k_j>              for j < i
    X    = (I + A)^-1

One program serves a chunk and HEADS value heads of a key head, one after the other: the products of
keys and queries are theirs together. A chunk is aligned to the start of its sequence.

Chunks have places, the first dimension of what is stored for each: in a batch ``cdiv(T, BT)`` for a
sequence; of packed sequences, number n has the places from ``cu_seqlens[n] // BT + n`` on. They are
at least as many as its chunks, ``cdiv(T, BT) + N`` in all, and no other length need be known.

Tensors, beside those of the glossary (gdn_ops/README.md); what is made here is contiguous. With
x_scale = rsqrt(sum(x * x) + 1e-6) where USE_QK_L2NORM, else 1, they are for the scan, where
IS_SCALED, so that it needs neither beta nor the norms:

    G        [places, HV, ROWS, BT]  exp(G) q_scale, zero past the sequence; with USE_QK_L2NORM
                             k_scale / q_scale; last exp(G_last), the same for all tokens
    inverse  [B, T, HV, BT]    the main output: what each x of chunk_scan.py adds to the state along
                             each key, row i of diag(exp(G_last - G) k_scale) X diag(beta)
    weights  [B, T, HV, BT]    what each x adds to each output but for ``scale``: row i of
                             (D <q, k>) X diag(beta)

and else, where ``weights`` is absent,

    G        the natural logarithms: G; with USE_QK_L2NORM then G + log q_scale, G + log k_scale
    inverse  row i of X

Rows of tokens past cu_seqlens[-1] belong to no chunk and stay unwritten. ``G`` is float64 where the
inputs are float32: it reaches hundreds, and exp of a float32 difference of two such sums is off by
an order of magnitude more than the token loop.

Tiles and flags: ``BT`` tokens of a chunk, 16, 32 or 64; ``BK >= K``, of which ``KB`` are read at
once, STAGES ahead; ``BN`` bounds read at once; ``DOT`` the dtype of the products of keys;
``PRECISION`` the ``input_precision`` of float32 products; NORMS_BY_PRODUCT has tensor cores square
what USE_QK_L2NORM normalises; STARTS_NEXT lets a kernel that waits for this one begin; PROGRAM and
PROGRAMS are numbers where another kernel calls this one (chunk_prepare_beside.py), else None.
"""

import triton
import triton.language as tl

from .chunk_inverse import invert_chunk
from .input import load_input
from .norm import inverse_root, squares
from .output import store_output

AXES = {
    "q": "bthk",
    "k": "bthk",
    "g": "bth",
    "beta": "bth",
    "cu_seqlens": "n",
    "G": "chrt",
    "weights": "bthj",
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
def find_chunk(cu_seqlens, i_c, stride_cu_seqlens_n, N, BT, BN: tl.constexpr):
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
def diagonal(b_x):
    """Of a square tile."""
    o_i = tl.arange(0, b_x.shape[0])
    return tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_x, 0.0), 1)


@triton.jit
def prepare_kernel(
    q,
    k,
    g,
    beta,
    cu_seqlens,
    G,
    weights,
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
    KB: tl.constexpr,
    STAGES: tl.constexpr,
    HEADS: tl.constexpr,
    NORMS_BY_PRODUCT: tl.constexpr,
    STARTS_NEXT: tl.constexpr,
    PROGRAM: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """One chunk of HEADS value heads; the grid is ``places * HV // HEADS``."""
    tl.static_assert(BK >= K and (BT == 16 or BT == 32 or BT == 64))
    tl.static_assert(HV // H % HEADS == 0)
    if STARTS_NEXT:
        tl.extra.cuda.gdc_launch_dependents()
    i_program = tl.program_id(0) if PROGRAM is None else PROGRAM
    i_first = i_program % (HV // HEADS) * HEADS
    i_h = i_first // (HV // H)
    i_c = i_program // (HV // HEADS)
    if IS_VARLEN:
        programs = tl.num_programs(0) if PROGRAMS is None else PROGRAMS
        N = programs // (HV // HEADS) - tl.cdiv(T, BT)
        i_n, i_chunk = find_chunk(cu_seqlens, i_c, stride_cu_seqlens_n, N, BT, BN)
        i_start, length = load_bounds(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        i_b = i_c.to(tl.int64) * 0
    else:
        i_chunk = i_c % tl.cdiv(T, BT)
        i_b = (i_c // tl.cdiv(T, BT)).to(tl.int64)
        i_start = 0
        length = T
    o_i = tl.arange(0, BT)
    m_t = i_chunk * BT + o_i < length
    o_t = (i_start + i_chunk * BT + o_i).to(tl.int64)
    # Of a load of BT of beta each thread would do its own again for the columns.
    o_2 = i_chunk * BT + tl.arange(0, 2 * BT) // 2
    m_2 = o_2 < length
    # Before the first product: after it they took 10 of 131 us.
    o_2t = (i_start + o_2).to(tl.int64)
    b_g_next = tl.zeros((BT,), tl.float32)
    if HAS_G:
        b_g_next = load_input(g, (i_b, o_t, i_first), (stride_g_b, stride_g_t, stride_g_h), m_t)
    b_beta_next = tl.zeros((2 * BT,), tl.float32)
    if HAS_BETA:
        b_beta_next = load_input(
            beta, (i_b, o_2t, i_first), (stride_beta_b, stride_beta_t, stride_beta_h), m_2
        )

    p_k = k + i_b * stride_k_b + o_t[:, None] * stride_k_t + i_h * stride_k_h
    p_q = q
    if USE_QK_L2NORM or IS_SCALED:
        p_q += i_b * stride_q_b + o_t[:, None] * stride_q_t + i_h * stride_q_h
    b_KK = tl.zeros((BT, BT), tl.float32)
    b_QK = b_KK
    b_QQ = b_KK
    b_k_squares = tl.zeros((BT,), tl.float32)
    b_q_squares = b_k_squares
    for i_k in tl.range(0, BK, KB, num_stages=STAGES):
        o_k = i_k + tl.arange(0, KB)
        m_k = m_t[:, None] & (o_k < K)[None, :]
        b_k = tl.load(p_k + o_k[None, :] * stride_k_k, m_k, 0.0).to(DOT)
        b_KK = tl.dot(b_k, tl.trans(b_k), b_KK, input_precision=PRECISION)
        if USE_QK_L2NORM or IS_SCALED:
            b_q = tl.load(p_q + o_k[None, :] * stride_q_k, m_k, 0.0).to(DOT)
        if IS_SCALED:
            b_QK = tl.dot(b_q, tl.trans(b_k), b_QK, input_precision=PRECISION)
        if USE_QK_L2NORM and NORMS_BY_PRODUCT:
            b_QQ = tl.dot(b_q, tl.trans(b_q), b_QQ, input_precision=PRECISION)
        if USE_QK_L2NORM and not NORMS_BY_PRODUCT:
            b_k_squares += squares(b_k.to(tl.float32))
            b_q_squares += squares(b_q.to(tl.float32))
    if USE_QK_L2NORM:
        if NORMS_BY_PRODUCT:
            b_k_squares = diagonal(b_KK)
            b_q_squares = diagonal(b_QQ)
        b_k_scale = inverse_root(b_k_squares)
        b_q_scale = inverse_root(b_q_squares)
        b_KK *= b_k_scale[None, :] * b_k_scale[:, None]
        b_QK *= b_k_scale[None, :] * b_q_scale[:, None]
    b_KK = tl.where(o_i[:, None] > o_i[None, :], b_KK, 0.0)
    if IS_SCALED:
        b_QK = tl.where(o_i[:, None] >= o_i[None, :], b_QK, 0.0)
    ROWS: tl.constexpr = 3 if USE_QK_L2NORM else (2 if IS_SCALED else 1)

    if i_chunk * BT < length:
        for i_head in range(HEADS):
            i_hv = i_first + i_head
            b_g = b_g_next.to(G.dtype.element_ty)
            # exp of this is zero in float32. Beyond it, sums would only lose digits, or be NaN.
            b_g = tl.where(b_g < -104.0, -104.0, b_g)
            b_beta_2 = b_beta_next
            if HEADS > 1:
                i_next = i_hv + 1
                is_next = i_head + 1 < HEADS
                if HAS_G:
                    b_g_next = load_input(
                        g,
                        (i_b, o_t, i_next),
                        (stride_g_b, stride_g_t, stride_g_h),
                        m_t & is_next,
                    )
                if HAS_BETA:
                    b_beta_next = load_input(
                        beta,
                        (i_b, o_2t, i_next),
                        (stride_beta_b, stride_beta_t, stride_beta_h),
                        m_2 & is_next,
                    )
            b_G = tl.cumsum(b_g, 0)
            b_sum = tl.sum(b_g, 0) * 1.4426950408889634
            b_G2 = b_G * 1.4426950408889634
            p_G = G + (i_c.to(tl.int64) * HV + i_hv) * (ROWS * BT) + o_i
            if IS_SCALED:
                b_row = tl.exp2(b_G2.to(tl.float32))
                if USE_QK_L2NORM:
                    b_row *= b_q_scale
                    tl.store(p_G + BT, tl.where(m_t, b_k_scale / b_q_scale, 0.0))
                tl.store(p_G, tl.where(m_t, b_row, 0.0))
                tl.store(p_G + (ROWS - 1) * BT, tl.exp2(b_sum + tl.zeros_like(b_G)))
            else:
                tl.store(p_G, tl.where(m_t, b_G, 0.0))
                if USE_QK_L2NORM:
                    b_Gq = b_G + tl.log(b_q_scale.to(b_G.dtype))
                    b_Gk = b_G + tl.log(b_k_scale.to(b_G.dtype))
                    tl.store(p_G + BT, tl.where(m_t, b_Gq, 0.0))
                    tl.store(p_G + 2 * BT, tl.where(m_t, b_Gk, 0.0))
            # Above the diagonal, where the products are zero, any number but infinity is as good.
            b_D = tl.exp2(tl.minimum(b_G2[:, None] - b_G2[None, :], 0.0).to(tl.float32))
            b_A = b_KK * b_D
            if HAS_BETA:
                b_beta, _ = tl.split(tl.reshape(b_beta_2, (BT, 2)))
                b_A *= b_beta[:, None]
            if IS_SCALED:
                b_P = (b_QK * b_D).to(DOT)
            b_X = invert_chunk(b_A, BT, DOT, PRECISION)
            if IS_SCALED:
                # Rounded before beta: with one beta for keys that are alike, what rows lose would
                # be alike too, and its sum in ``o`` up to 4 times as much.
                b_W = tl.dot(b_P, b_X.to(DOT), input_precision=PRECISION)
                b_tail = tl.exp2((b_sum - b_G2).to(tl.float32))
                if USE_QK_L2NORM:
                    b_tail *= b_k_scale
                b_X *= b_tail[:, None]
                if HAS_BETA:
                    b_X *= b_beta[None, :]
            store_output(
                inverse,
                (i_b, o_t[:, None], i_hv, o_i[None, :]),
                (stride_inverse_b, stride_inverse_t, stride_inverse_h, stride_inverse_j),
                b_X,
                m_t[:, None] & (o_i < BT)[None, :],
            )
            if IS_SCALED:
                if HAS_BETA:
                    b_W *= b_beta[None, :]
                p_W = weights + ((i_b * T + i_start + i_chunk * BT) * HV + i_hv) * BT
                p_W += o_i[:, None] * (HV * BT) + o_i[None, :]
                tl.store(p_W, b_W.to(weights.dtype.element_ty), m_t[:, None])
