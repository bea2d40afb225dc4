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
what USE_QK_L2NORM normalises; STARTS_NEXT lets a kernel that waits for this one begin.
"""

import triton
import triton.language as tl

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
def round_operand(b_x):
    """A float32 operand, rounded to bfloat16: that, and the same as float32.

    Rounded as an integer: the conversion and its reverse take a slow unit, one number at a time.
    """
    b_rounded = (b_x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000
    b_rounded = b_rounded.to(tl.float32, bitcast=True)
    return b_rounded.to(tl.bfloat16), b_rounded


@triton.jit
def split_operand(b_x):
    """A float32 operand as a sum of two of bfloat16, which have 16 of its 24 digits."""
    b_high, b_rounded = round_operand(b_x)
    return b_high, (b_x - b_rounded).to(tl.bfloat16)


@triton.jit
def is_lower_block(o_i, o_j, n: tl.constexpr):
    """Whether row and column are in the lower left quarter ``[n, n]`` of a diagonal block."""
    return (o_i // (2 * n) == o_j // (2 * n)) & (o_i // n > o_j // n)


@triton.jit
def merge_blocks(b_X, n, m_low, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Of inverses of diagonal blocks of ``I - N`` those of blocks of twice the size.

    The inverse of ``[[a, 0], [-b, c]]`` has ``c^-1 b a^-1`` below its diagonal, in ``X N X`` where
    ``m_low`` is. The operand in memory is first N, then X, and both can be there before either
    product: of ``X (N X)`` the second would have to wait for the result of the first to be stored.
    """
    x = b_X.to(OPERAND)
    b_Y = tl.where(m_low, tl.dot(x, n, input_precision=PRECISION), 0.0)
    return tl.dot(b_Y.to(OPERAND), x, b_X, input_precision=PRECISION)


@triton.jit
def invert_diagonal(b_N, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """The inverses of the diagonal blocks of 16 of ``I - N``, stacked ``[BT, 16]``.

    With four warps each has its block, and no other needs to wait.
    """
    BT: tl.constexpr = b_N.shape[0]
    o_i = tl.arange(0, BT)
    b_D = tl.where(o_i[:, None] // 16 == o_i[None, :] // 16, b_N, 0.0)
    b_D = tl.sum(tl.reshape(b_D, (BT, BT // 16, 16)), 1)
    b_D = tl.reshape(b_D, (BT // 16, 16, 16))
    o_r = tl.arange(0, 16)[None, :, None]
    o_c = tl.arange(0, 16)[None, None, :]
    b_X = tl.where(o_r == o_c, 1.0, tl.where(o_r // 2 == o_c // 2, b_D, 0.0))
    for i in tl.static_range(1, 4):
        x = b_X.to(OPERAND)
        b_L = tl.where(is_lower_block(o_r, o_c, 2**i), b_D, 0.0)
        b_Y = tl.dot(b_L.to(OPERAND), x, input_precision=PRECISION)
        b_X = tl.dot(x, b_Y.to(OPERAND), b_X, input_precision=PRECISION)
    return tl.reshape(b_X, (BT, 16))


@triton.jit
def invert_chunk(b_A, BT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + A)^-1`` of strictly lower ``[BT, BT]``: blocks of 2, then merges of two.

    Merging is stable. Powers of the whole of A, the other way without a loop, cancel: they reach
    thousands where the keys of a chunk are alike. Merges of bfloat16 leave an error of a percent,
    and a step of Newton, ``X + (I - X (I + A)) X`` with A in two parts, its square: with reflected
    keys that are alike an error of 3e-3, which float16 needs a second step for.
    """
    OPERAND: tl.constexpr = tl.float32 if DOT.is_fp32() else tl.bfloat16
    o_i = tl.arange(0, BT)[:, None]
    o_j = tl.arange(0, BT)[None, :]
    b_N = -b_A
    if DOT.is_fp32():
        n = b_N
    else:
        n, dn = split_operand(b_N)
    b_X = invert_diagonal(b_N, OPERAND, PRECISION)
    if BT > 16:
        # Each block beside itself BT / 16 times, by a product: elsewhere it would move in memory.
        b_E = tl.where(tl.arange(0, 16)[:, None] == o_j % 16, 1.0, 0.0)
        b_X = tl.dot(b_X.to(OPERAND), b_E.to(OPERAND), input_precision=PRECISION)
        b_X = tl.where(o_i // 16 == o_j // 16, b_X, 0.0)
        b_X = merge_blocks(b_X, n, is_lower_block(o_i, o_j, 16), OPERAND, PRECISION)
    if BT == 64:
        b_X = merge_blocks(b_X, n, is_lower_block(o_i, o_j, 32), OPERAND, PRECISION)
    if not DOT.is_fp32():
        for _ in tl.static_range(2 if DOT.is_fp16() else 1):
            x, b_X = round_operand(b_X)
            b_R = tl.dot(x, dn, -b_X)
            b_R = tl.dot(x, n, b_R)
            # I comes last: as the start of the sum it would be 32 registers throughout the loop.
            b_R = tl.where(o_i == o_j, b_R + 1.0, b_R)
            b_X = tl.dot(b_R.to(OPERAND), x, b_X)
    return b_X


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
):
    """One chunk of HEADS value heads; the grid is ``places * HV // HEADS``."""
    tl.static_assert(BK >= K and (BT == 16 or BT == 32 or BT == 64))
    tl.static_assert(HV // H % HEADS == 0)
    if STARTS_NEXT:
        tl.extra.cuda.gdc_launch_dependents()
    i_first = tl.program_id(0) % (HV // HEADS) * HEADS
    i_h = i_first // (HV // H)
    i_c = tl.program_id(0) // (HV // HEADS)
    if IS_VARLEN:
        N = tl.num_programs(0) // (HV // HEADS) - tl.cdiv(T, BT)
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
