"""Second stage of the chunked backward: the gradient of the state, from the last chunk on back.

    du = P^T do + (exp(G_last - G) k) dS'^T                 P_ij = scale exp(G_i - G_j) <q_i, k_j>
    dr = X^T du                                             X = (I + A)^-1, from chunk_prepare.py
    dS = exp(G_last) dS' + scale do^T (exp(G) q) - (beta dr)^T (exp(G) k)

A program walks the chunks of one sequence and value head with rows ``BV`` of ``dS`` in registers.
It stores the gradient of the state that leaves each chunk, and ``dr``; at last the gradient of the
initial state.

Tensors, beside those of the glossary, of chunk_prepare.py and of the first stage:

    dstates         [places, HV, V, K]  gradient of the state after each chunk, dtype of q
    dinitial_state  [N, HV, V, K]
    dr              [B, T, HV, V]       gradient of what a token would write, were beta 1. The main
                                        output

Traffic of a chunk and value head, in numbers: ``BT (2 K + V + BT)`` read, ``K V + BT V`` written.
"""

import triton
import triton.language as tl

from .chunk_backward_replay import load_row
from .chunk_prepare import decay_between, load_bounds
from .output import store_output

AXES = {
    "do": "bthv",
    "dfinal_state": "nhvk",
    "q": "bthk",
    "k": "bthk",
    "beta": "bth",
    "cu_seqlens": "n",
    "G": "chrt",
    "inverse": "bthj",
    "dstates": "chvk",
    "dinitial_state": "nhvk",
    "dr": "bthv",
}
SIZES = {"T": "q_t"}


@triton.jit
def chunk_reverse_kernel(
    do,
    dfinal_state,
    q,
    k,
    beta,
    cu_seqlens,
    G,
    inverse,
    dstates,
    dinitial_state,
    dr,
    stride_do_b,
    stride_do_t,
    stride_do_h,
    stride_do_v,
    stride_dfinal_state_n,
    stride_dfinal_state_h,
    stride_dfinal_state_v,
    stride_dfinal_state_k,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_q_k,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_k_k,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    stride_cu_seqlens_n,
    stride_dr_b,
    stride_dr_t,
    stride_dr_h,
    stride_dr_v,
    T,
    scale: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_DFINAL_STATE: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
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
    """One sequence, value head and tile of V; the grid is ``N * HV * cdiv(V, BV)``."""
    tl.static_assert(BK >= K)
    i_v = tl.program_id(0) % tl.cdiv(V, BV)
    i_hv = tl.program_id(0) // tl.cdiv(V, BV) % HV
    i_n = tl.program_id(0) // (tl.cdiv(V, BV) * HV)
    i_h = i_hv // (HV // H)
    i_b = tl.full((), i_n, tl.int64)
    i_start, length = 0, T
    i_place = i_b * tl.cdiv(T, BT)
    if IS_VARLEN:
        i_b = tl.full((), 0, tl.int64)
        N = tl.num_programs(0) // (tl.cdiv(V, BV) * HV)
        i_start, length = load_bounds(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        i_place = (i_start // BT + i_n).to(tl.int64)

    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_state = (o_v < V)[:, None] & (o_k < K)[None, :]
    o_state = o_v.to(tl.int64)[:, None] * K + o_k[None, :]
    b_dS = tl.zeros((BV, BK), tl.float32)
    if HAS_DFINAL_STATE:
        p_dS = dfinal_state + tl.full((), i_n, tl.int64) * stride_dfinal_state_n
        p_dS += i_hv * stride_dfinal_state_h
        p_dS += o_v[:, None] * stride_dfinal_state_v + o_k[None, :] * stride_dfinal_state_k
        b_dS = tl.load(p_dS, m_state, 0.0).to(tl.float32)

    i_first = tl.full((), i_start, tl.int64)
    p_q = q + i_b * stride_q_b + i_first * stride_q_t + i_h * stride_q_h
    p_k = k + i_b * stride_k_b + i_first * stride_k_t + i_h * stride_k_h
    p_do = do + i_b * stride_do_b + i_first * stride_do_t + i_hv * stride_do_h
    p_inverse = inverse + ((i_b * T + i_first) * HV + i_hv) * BT
    p_dstates = dstates + (i_place * HV + i_hv) * (V * K)
    ROWS: tl.constexpr = 3 if USE_QK_L2NORM else 1
    p_G = G + (i_place * HV + i_hv) * (ROWS * BT)
    p_beta = beta
    if HAS_BETA:
        p_beta += i_b * stride_beta_b + i_hv * stride_beta_h
    # A descriptor ends where the sequence ends: what is past it reads as zero, and is not written.
    rows = tl.maximum(length, 1)
    i_token = i_first.to(tl.int32)
    d_G, d_beta = None, None
    if USE_DESCRIPTORS:
        d_q = tl.make_tensor_descriptor(p_q, [rows, K], [stride_q_t, 1], [BT, BK])
        d_k = tl.make_tensor_descriptor(p_k, [rows, K], [stride_k_t, 1], [BT, BK])
        d_do = tl.make_tensor_descriptor(p_do, [rows, V], [stride_do_t, 1], [BT, BV])
        d_inverse = tl.make_tensor_descriptor(p_inverse, [rows, BT], [HV * BT, 1], [BT, BT])
        d_dstates = tl.make_tensor_descriptor(
            p_dstates, [tl.cdiv(rows, BT), V, K], [HV * V * K, K, 1], [1, BV, BK]
        )
        places = tl.cdiv(rows, BT) * BT
        d_G = tl.make_tensor_descriptor(p_G, [places * HV * ROWS], [1], [BT])
        # A row of numbers is read from a multiple of 16 bytes on only: others are an illegal
        # instruction on sm_90, and packed sequences start anywhere.
        if HAS_BETA and not IS_VARLEN:
            d_beta = tl.make_tensor_descriptor(p_beta, [i_token + rows], [1], [BT])
    if USE_DESCRIPTOR_STORE:
        p_dr = dr + i_b * stride_dr_b + i_first * stride_dr_t + i_hv * stride_dr_h
        d_dr = tl.make_tensor_descriptor(p_dr, [rows, V], [stride_dr_t, 1], [BT, BV])
    if HAS_BETA:
        p_beta += i_first * stride_beta_t
    m_pairs = o_i[:, None] >= o_i[None, :]
    chunks = tl.cdiv(length, BT)
    # Read a chunk ahead: Triton does so only for what leads to the operands of a product.
    p_last = p_G + tl.full((), chunks - 1, tl.int64) * (BT * HV * ROWS) + (length - 1) % BT
    b_next = tl.load(p_last, length > 0, 0.0)
    for i_back in range(chunks):
        i_t = chunks - 1 - i_back
        i_row = tl.full((), i_t * BT, tl.int64)
        # Addresses are made of it where they are used: kept from chunk to chunk, they would not fit
        # the registers.
        o_t = i_t * BT + o_i
        m_t = o_t < length
        m_v = m_t[:, None] & (o_v < V)[None, :]
        if USE_DESCRIPTORS:
            b_q = d_q.load([i_t * BT, 0]).to(DOT)
            b_k = d_k.load([i_t * BT, 0]).to(DOT)
        else:
            m_k = m_t[:, None] & (o_k < K)[None, :]
            o_tq = o_t.to(tl.int64)[:, None] * stride_q_t + o_k[None, :] * stride_q_k
            o_tk = o_t.to(tl.int64)[:, None] * stride_k_t + o_k[None, :] * stride_k_k
            b_q = tl.load(p_q + o_tq, m_k, 0.0).to(DOT)
            b_k = tl.load(p_k + o_tk, m_k, 0.0).to(DOT)
        b_P = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)

        # A vector is read where it is used, since it takes as many registers as a tile. The norms
        # of q and k are part of the log decays that end and start at their tokens.
        i_G = i_t * BT * HV * ROWS
        p_t = p_G + i_row * (HV * ROWS)
        b_last = b_next * 1.4426950408889634
        b_next = tl.load(p_t - (BT * HV * ROWS - BT + 1), i_t > 0, 0.0)
        b_G = load_row(d_G, p_t, i_G, o_i, m_t, USE_DESCRIPTORS) * 1.4426950408889634
        b_Gq, b_Gk = b_G, b_G
        if USE_QK_L2NORM:
            b_Gq = load_row(d_G, p_t + BT, i_G + BT, o_i, m_t, USE_DESCRIPTORS)
            b_Gq *= 1.4426950408889634
            b_Gk = load_row(d_G, p_t + 2 * BT, i_G + 2 * BT, o_i, m_t, USE_DESCRIPTORS)
            b_Gk *= 1.4426950408889634
            b_G = 2 * b_G - b_Gk
        b_D = decay_between(b_Gq[:, None], b_G[None, :], m_pairs)
        # In the mask of the decays the tokens would take ten registers more.
        b_P = tl.where(m_t[:, None], b_P * b_D * scale, 0.0).to(DOT)

        # Transposed, [BV, BT]: dS and what comes of it stay in registers as left operands.
        b_dSd = b_dS.to(DOT)
        if USE_DESCRIPTORS:
            d_dstates.store([i_t, i_v * BV, 0], tl.reshape(b_dSd, (1, BV, BK)))
            b_do = d_do.load([i_t * BT, i_v * BV])
            b_X = d_inverse.load([i_t * BT, 0]).to(DOT)
        else:
            tl.store(p_dstates + i_row // BT * (HV * V * K) + o_state, b_dSd, m_state)
            o_tv = o_t.to(tl.int64)[:, None] * stride_do_t + o_v[None, :] * stride_do_v
            o_tt = o_t.to(tl.int64)[:, None] * (HV * BT) + o_i[None, :]
            b_do = tl.load(p_do + o_tv, m_v, 0.0)
            b_X = tl.load(p_inverse + o_tt, m_t[:, None], 0.0).to(DOT)
        b_do = tl.trans(b_do).to(DOT)
        b_dS *= tl.exp2(b_last.to(tl.float32))
        b_from_q = tl.exp2(b_Gq.to(tl.float32)) * scale
        b_doq = (b_do.to(tl.float32) * b_from_q[None, :]).to(DOT)
        b_dS = tl.dot(b_doq, b_q, b_dS, input_precision=PRECISION)
        b_du = tl.dot(b_dSd, tl.trans(b_k), input_precision=PRECISION)
        b_du *= tl.exp2((b_last - b_G).to(tl.float32))[None, :]
        b_du = tl.dot(b_do, b_P, b_du, input_precision=PRECISION)
        b_dr = tl.dot(b_du.to(DOT), b_X, input_precision=PRECISION)
        if USE_DESCRIPTOR_STORE:
            d_dr.store([i_t * BT, i_v * BV], tl.trans(b_dr).to(dr.dtype.element_ty))
        else:
            store_output(
                dr,
                (i_b, (i_token + o_t).to(tl.int64)[:, None], i_hv, o_v[None, :]),
                (stride_dr_b, stride_dr_t, stride_dr_h, stride_dr_v),
                tl.trans(b_dr),
                m_v,
            )
        b_from_k = -tl.exp2(b_Gk.to(tl.float32))
        if HAS_BETA:
            b_beta = load_row(
                d_beta,
                p_beta,
                i_token + i_t * BT,
                o_t.to(tl.int64) * stride_beta_t,
                m_t,
                USE_DESCRIPTORS and not IS_VARLEN,
            )
            b_from_k *= b_beta.to(tl.float32)
        b_dr = (b_dr * b_from_k[None, :]).to(DOT)
        b_dS = tl.dot(b_dr, b_k, b_dS, input_precision=PRECISION)
    if HAS_INITIAL_STATE:
        p_dS = dinitial_state + (tl.full((), i_n, tl.int64) * HV + i_hv) * (V * K) + o_state
        tl.store(p_dS, b_dS.to(dinitial_state.dtype.element_ty), m_state)
