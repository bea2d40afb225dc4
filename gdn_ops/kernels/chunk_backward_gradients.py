"""Third stage of the chunked backward: every gradient of a chunk, from the states around it.

With ``S`` the state before the chunk, ``dS'`` the gradient of the state after it and ``D_ij =
exp(G_i - G_j)`` for ``j <= i``,

    dq    = scale (exp(G) do S + (D do u^T) k)
    dk    = scale (D do u^T)^T q + beta (Z + Z^T) k - beta exp(G) dr S + exp(G_last - G) u dS'
    dv    = beta dr                                       Z = - strictly lower part of D dr u^T
    dbeta = <dr, v> - exp(G) <dr S, k> + sum_j Z_ij <k_i, k_j>

The gradient of ``G`` is the sum of the same products, each times what it multiplies; that of ``g``
is its sum from the token to the end of the chunk, and ``exp(G_last) <dS', S>``.

A program serves a key head, and walks its value heads three times: for the products of tokens, then
for ``dq``, then for ``dk``. Both are sums over the value heads, and only one of them is held at a
time; there are no atomics, and every run gives the same bits. What belongs to a value head is kept
from walk to walk in a row of a tile ``[BR, BT]``, with ``BR >= HV / H``.

Tensors, beside those of the other stages: ``do`` must be contiguous, and so is what is made. Tokens
of no sequence get zeros.

Traffic of a chunk and value head, in numbers: ``2 K V + 4 BT V`` read, ``BT V`` written; of a chunk
and key head ``2 BT K`` read and as much written. What a later walk reads again is in the cache.
"""

import triton
import triton.language as tl

from .chunk_prepare import decay_between, find_chunk, load_bounds
from .output import store_output

AXES = {
    "do": "bthv",
    "q": "bthk",
    "k": "bthk",
    "v": "bthv",
    "beta": "bth",
    "cu_seqlens": "n",
    "G": "chrt",
    "states": "chvk",
    "dstates": "chvk",
    "u": "bthv",
    "dr": "bthv",
    "dk": "bthk",
    "dv": "bthv",
    "dg": "bth",
    "dbeta": "bth",
    "dq": "bthk",
}
SIZES = {"T": "q_t"}


@triton.jit
def decays_of_chunk(b_G, b_last):
    """Decays of a chunk: from its start to each token, and from each token to its end."""
    b_tail = tl.minimum(b_last - b_G, 0.0)
    return tl.exp2(b_G.to(tl.float32)), tl.exp2(b_tail.to(tl.float32))


@triton.jit
def scale_of_rows(b_Gx, b_G):
    """``x_scale`` from its row of ``G``; the other row is to base 2 already."""
    return tl.exp2((b_Gx * 1.4426950408889634 - b_G).to(tl.float32))


@triton.jit
def row_products(b_x, b_y, WIDE: tl.constexpr):
    """Inner products of the rows of two tiles, in the dtype of the log decays."""
    return tl.sum(b_x.to(WIDE) * b_y.to(WIDE), 1)


@triton.jit
def add_to_row(b_rows, b_row, i_r):
    """``b_row`` added to row ``i_r`` of a tile that has one for each value head."""
    m_r = tl.arange(0, b_rows.shape[0])[:, None] == i_r
    return b_rows + tl.where(m_r, b_row[None, :], 0.0)


@triton.jit
def take_row(b_rows, i_r):
    """Row ``i_r`` of a tile that has one for each value head."""
    m_r = tl.arange(0, b_rows.shape[0])[:, None] == i_r
    return tl.sum(tl.where(m_r, b_rows, 0.0), 0)


@triton.jit
def load_decays(p_G, o_i, m_t, valid, BT: tl.constexpr):
    """Log decays of a chunk to base 2, and that of its last token."""
    b_G = tl.load(p_G + o_i, m_t, 0.0) * 1.4426950408889634
    return b_G, tl.load(p_G + tl.minimum(valid, BT) - 1) * 1.4426950408889634


@triton.jit
def through_state(
    p_x,
    p_S,
    m_t,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """The product of rows of a value head and a state."""
    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    b_xS = tl.zeros((BT, BK), tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = m_t[:, None] & (o_v < V)[None, :]
        m_S = (o_v < V)[:, None] & (o_k < K)[None, :]
        b_x = tl.load(p_x + o_i[:, None] * (HV * V) + o_v[None, :], m_v, 0.0).to(DOT)
        b_S = tl.load(p_S + o_v[:, None] * K + o_k[None, :], m_S, 0.0).to(DOT)
        b_xS = tl.dot(b_x, b_S, b_xS, input_precision=PRECISION)
    return b_xS


@triton.jit
def chunk_gradients_kernel(
    do,
    q,
    k,
    v,
    beta,
    cu_seqlens,
    G,
    states,
    dstates,
    u,
    dr,
    dk,
    dv,
    dg,
    dbeta,
    dq,
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
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    stride_cu_seqlens_n,
    stride_dq_b,
    stride_dq_t,
    stride_dq_h,
    stride_dq_k,
    T,
    scale: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_BETA: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """One place of a chunk and one key head; the grid is ``places * H``."""
    tl.static_assert(BK >= K)
    R: tl.constexpr = HV // H
    i_h = tl.program_id(0) % H
    i_place = tl.program_id(0) // H
    if IS_VARLEN:
        N = tl.num_programs(0) // H - tl.cdiv(T, BT)
        # The tokens past the last bound count as one more sequence, of which none is valid.
        i_n, i_t = find_chunk(cu_seqlens, i_place, stride_cu_seqlens_n, N + 1, BT, BN)
        i_start, length = load_bounds(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        stored = length - i_t * BT
        valid = tl.where(i_n < N, stored, 0)
        i_b = tl.full((), 0, tl.int64)
        i_first = (i_start + i_t * BT).to(tl.int64)
    else:
        i_b = (i_place // tl.cdiv(T, BT)).to(tl.int64)
        i_first = (i_place % tl.cdiv(T, BT)).to(tl.int64) * BT
        valid = (T - i_first).to(tl.int32)
        stored = valid

    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_t = o_i < valid
    m_stored = o_i < stored
    m_k = m_t[:, None] & (o_k < K)[None, :]
    p_q = q + i_b * stride_q_b + i_first * stride_q_t + i_h * stride_q_h
    p_k = k + i_b * stride_k_b + i_first * stride_k_t + i_h * stride_k_h
    o_tq = o_i[:, None] * stride_q_t + o_k[None, :] * stride_q_k
    b_q = tl.load(p_q + o_tq, m_k, 0.0).to(DOT)
    o_tk = o_i[:, None] * stride_k_t + o_k[None, :] * stride_k_k
    b_k = tl.load(p_k + o_tk, m_k, 0.0).to(DOT)
    WIDE: tl.constexpr = G.dtype.element_ty
    ROWS: tl.constexpr = 3 if USE_QK_L2NORM else 1
    if USE_QK_L2NORM:
        # Of the first value head: those of the others are the same.
        p_rows = G + (i_place.to(tl.int64) * HV + i_h * R) * (ROWS * BT) + o_i
        b_row = tl.load(p_rows, m_t, 0.0) * 1.4426950408889634
        b_valid = m_t.to(tl.float32)
        b_q_scale = b_valid * scale_of_rows(tl.load(p_rows + BT, m_t, 0.0), b_row)
        b_k_scale = b_valid * scale_of_rows(tl.load(p_rows + 2 * BT, m_t, 0.0), b_row)
    m_pairs = o_i[:, None] >= o_i[None, :]
    m_lower = o_i[:, None] > o_i[None, :]

    heads = tl.where(valid > 0, R, 0)
    o_row = (i_b * T + i_first) * HV + i_h * R
    p_G = G + (i_place.to(tl.int64) * HV + i_h * R) * (ROWS * BT)
    p_S = states + (i_place.to(tl.int64) * HV + i_h * R) * (V * K)
    p_dS = dstates + (i_place.to(tl.int64) * HV + i_h * R) * (V * K)
    p_v = v + i_b * stride_v_b + i_first * stride_v_t + i_h * R * stride_v_h
    p_beta = beta
    if HAS_BETA:
        p_beta += i_b * stride_beta_b + i_first * stride_beta_t + i_h * R * stride_beta_h

    # From token to token; of the products of q and k as they were read.
    b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_kk = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    b_dqk = tl.zeros((BT, BT), tl.float32)
    b_dkk = tl.zeros((BT, BT), tl.float32)
    b_dG_rows = tl.zeros((BR, BT), WIDE)
    b_dbeta_rows = tl.zeros((BR, BT), WIDE)
    for i_r in range(heads):
        b_G, _ = load_decays(p_G + i_r * (ROWS * BT), o_i, m_t, valid, BT)
        b_beta = m_t.to(tl.float32)
        if HAS_BETA:
            b_beta = tl.load(p_beta + i_r * stride_beta_h + o_i * stride_beta_t, m_t, 0.0).to(
                tl.float32
            )
        o_r = o_row + i_r
        b_dP = tl.zeros((BT, BT), tl.float32)
        b_dA = tl.zeros((BT, BT), tl.float32)
        b_dbeta = tl.zeros((BT,), WIDE)
        for i_v in range(tl.cdiv(V, BV)):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = m_t[:, None] & (o_v < V)[None, :]
            o_tv = o_i[:, None] * (HV * V) + o_v[None, :]
            b_do = tl.load(do + o_r * V + o_tv, m_v, 0.0).to(DOT)
            b_u = tl.load(u + o_r * V + o_tv, m_v, 0.0).to(DOT)
            b_dr = tl.load(dr + o_r * V + o_tv, m_v, 0.0).to(DOT)
            b_dP = tl.dot(b_do, tl.trans(b_u), b_dP, input_precision=PRECISION)
            b_dA = tl.dot(b_dr, tl.trans(b_u), b_dA, input_precision=PRECISION)
            if HAS_BETA:
                o_vv = o_i[:, None] * stride_v_t + o_v[None, :] * stride_v_v
                b_dbeta += row_products(
                    b_dr, tl.load(p_v + i_r * stride_v_h + o_vv, m_v, 0.0), WIDE
                )
            b_dv = (b_dr.to(tl.float32) * b_beta[:, None]).to(dv.dtype.element_ty)
            tl.store(dv + o_r * V + o_tv, b_dv, m_v)
        b_D = decay_between(b_G[:, None], b_G[None, :], m_pairs & m_t[:, None])
        if USE_QK_L2NORM:
            b_D *= b_k_scale[None, :]
            b_dP *= b_D * (b_q_scale * scale)[:, None]
            b_dA = tl.where(m_lower, -b_dA * b_D * b_k_scale[:, None], 0.0)
        else:
            b_dP *= b_D * scale
            b_dA = tl.where(m_lower, -b_dA * b_D, 0.0)
        if HAS_BETA:
            b_dbeta += row_products(b_kk, b_dA, WIDE)
            b_dbeta_rows = add_to_row(b_dbeta_rows, b_dbeta, i_r)
            b_dA *= b_beta[:, None]
        b_dqk += b_dP
        b_dkk += b_dA
        if HAS_G:
            b_pairs = b_qk.to(WIDE) * b_dP.to(WIDE) + b_kk.to(WIDE) * b_dA.to(WIDE)
            b_dG_rows = add_to_row(b_dG_rows, tl.sum(b_pairs, 1) - tl.sum(b_pairs, 0), i_r)
    b_dqk = b_dqk.to(DOT)
    b_dkk = (b_dkk + tl.trans(b_dkk)).to(DOT)

    # Through the state before the chunk.
    b_dq = tl.zeros((BT, BK), tl.float32)
    for i_r in range(heads):
        b_G, b_last = load_decays(p_G + i_r * (ROWS * BT), o_i, m_t, valid, BT)
        b_decay, _ = decays_of_chunk(b_G, b_last)
        p_do = do + (o_row + i_r) * V
        b_doS = through_state(p_do, p_S + i_r * (V * K), m_t, HV, K, V, DOT, PRECISION, BT, BK, BV)
        if USE_QK_L2NORM:
            b_decay *= b_q_scale
        b_doS *= (b_decay * scale)[:, None]
        b_dq += b_doS
        if HAS_G:
            b_dG = row_products(b_doS, tl.load(p_q + o_tq, m_k, 0.0), WIDE)
            b_dG_rows = add_to_row(b_dG_rows, b_dG, i_r)
    b_dq = tl.dot(b_dqk, b_k, b_dq, input_precision=PRECISION)
    m_out = m_stored[:, None] & (o_k < K)[None, :]
    if USE_QK_L2NORM:
        b_q0 = tl.load(p_q + o_tq, m_k, 0.0)
        b_dq -= b_q0 * (b_q_scale * b_q_scale * row_products(b_q0, b_dq, tl.float32))[:, None]
    store_output(
        dq,
        (i_b, (i_first + o_i)[:, None], i_h, o_k[None, :]),
        (stride_dq_b, stride_dq_t, stride_dq_h, stride_dq_k),
        b_dq,
        m_out,
    )

    # And through both states.
    b_dk = tl.zeros((BT, BK), tl.float32)
    for i_r in range(heads):
        b_G, b_last = load_decays(p_G + i_r * (ROWS * BT), o_i, m_t, valid, BT)
        b_decay, b_tail = decays_of_chunk(b_G, b_last)
        b_beta = m_t.to(tl.float32)
        if HAS_BETA:
            b_beta = tl.load(p_beta + i_r * stride_beta_h + o_i * stride_beta_t, m_t, 0.0).to(
                tl.float32
            )
        o_r = o_row + i_r
        b_drS = tl.zeros((BT, BK), tl.float32)
        b_udS = tl.zeros((BT, BK), tl.float32)
        b_dwhole = tl.zeros((BV, BK // 8), WIDE)
        for i_v in range(tl.cdiv(V, BV)):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = m_t[:, None] & (o_v < V)[None, :]
            m_S = (o_v < V)[:, None] & (o_k < K)[None, :]
            o_tv = o_r * V + o_i[:, None] * (HV * V) + o_v[None, :]
            o_vk = i_r * (V * K) + o_v[:, None] * K + o_k[None, :]
            b_S = tl.load(p_S + o_vk, m_S, 0.0).to(DOT)
            b_dS = tl.load(p_dS + o_vk, m_S, 0.0).to(DOT)
            b_dr = tl.load(dr + o_tv, m_v, 0.0).to(DOT)
            b_u = tl.load(u + o_tv, m_v, 0.0).to(DOT)
            b_drS = tl.dot(b_dr, b_S, b_drS, input_precision=PRECISION)
            b_udS = tl.dot(b_u, b_dS, b_udS, input_precision=PRECISION)
            if HAS_G:
                # Of eight neighbours by one thread: the others wait for the end of the loop.
                b_SdS = tl.reshape(b_S.to(WIDE) * b_dS.to(WIDE), (BV, BK // 8, 8))
                b_dwhole += tl.sum(b_SdS, 2)
        if USE_QK_L2NORM:
            b_decay *= b_k_scale
            b_tail *= b_k_scale
        b_drS *= -b_decay[:, None]
        b_dk += b_drS * b_beta[:, None]
        b_udS *= b_tail[:, None]
        b_dk += b_udS
        b_dG_k = row_products(b_drS, tl.load(p_k + o_tk, m_k, 0.0), WIDE)
        if HAS_BETA:
            b_dbeta = take_row(b_dbeta_rows, i_r) + b_dG_k
            p_dbeta = dbeta + o_r + o_i * HV
            tl.store(p_dbeta, b_dbeta.to(dbeta.dtype.element_ty), m_t)
        if HAS_G:
            b_dG_tail = row_products(b_udS, tl.load(p_k + o_tk, m_k, 0.0), WIDE)
            b_dg = tl.cumsum(take_row(b_dG_rows, i_r) + b_beta * b_dG_k, 0, reverse=True)
            # The decays to the end of the chunk that a token's own is part of: those before it.
            b_dg += tl.cumsum(b_dG_tail, 0) - b_dG_tail
            b_dg += tl.exp2(b_last.to(tl.float32)) * tl.sum(b_dwhole)
            tl.store(dg + o_r + o_i * HV, b_dg.to(tl.float32), m_t)
    # Two products one after the other would be laid out so that half of 8 warps repeat the rest.
    if valid > 0:
        b_dk = tl.dot(tl.trans(b_dqk), b_q, b_dk, input_precision=PRECISION)
    b_dk = tl.dot(b_dkk, b_k, b_dk, input_precision=PRECISION)
    if USE_QK_L2NORM:
        b_k0 = tl.load(p_k + o_tk, m_k, 0.0)
        b_dk -= b_k0 * (b_k_scale * b_k_scale * row_products(b_k0, b_dk, tl.float32))[:, None]
    p_dk = dk + ((i_b * T + i_first) * H + i_h) * K + o_i[:, None] * (H * K) + o_k[None, :]
    tl.store(p_dk, b_dk.to(dk.dtype.element_ty), m_out)

    # Tokens of no sequence.
    for i_r in range(tl.where((valid <= 0) & (stored > 0), R, 0)):
        o_rows = (i_b * T + i_first + o_i) * HV + i_h * R + i_r
        if HAS_G:
            tl.store(dg + o_rows, tl.zeros((BT,), tl.float32), m_stored)
        if HAS_BETA:
            tl.store(dbeta + o_rows, tl.zeros((BT,), dbeta.dtype.element_ty), m_stored)
        for i_v in range(tl.cdiv(V, BV)):
            o_v = i_v * BV + tl.arange(0, BV)
            m_v = m_stored[:, None] & (o_v < V)[None, :]
            b_zero = tl.zeros((BT, BV), dv.dtype.element_ty)
            tl.store(dv + o_rows[:, None] * V + o_v[None, :], b_zero, m_v)
