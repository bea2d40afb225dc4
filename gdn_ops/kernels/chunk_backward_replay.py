"""First stage of the chunked backward: the states of the forward once more, and what tokens wrote.

    u  = X beta (v - exp(G) k S^T)                          X = (I + A)^-1, from chunk_prepare.py
    S' = exp(G_last) S + u^T (exp(G_last - G) k)

A program walks the chunks of one sequence and value head with rows ``BV`` of the state in
registers. It stores the state that enters each chunk, and ``u``.

Tensors, beside those of the glossary and of chunk_prepare.py; what is made here is contiguous:

    beta    [B, T, HV]          with USE_DESCRIPTORS float32, and the tokens of a head adjacent in
                                rows of 16-byte multiples
    states  [places, HV, V, K]  state before each chunk, dtype of q; sequence n has the places from
                                ``cu_seqlens[n] // BT + n`` on (``find_chunk``), a row of the batch
                                ``cdiv(T, BT)``
    u       [B, T, HV, V]       what each token writes. The main output

Traffic of a chunk and value head, in numbers: ``BT (K + V + BT)`` read, ``K V + BT V`` written.
"""

import triton
import triton.language as tl

from .chunk_prepare import load_bounds
from .output import store_output

AXES = {
    "k": "bthk",
    "v": "bthv",
    "beta": "bth",
    "initial_state": "nhvk",
    "cu_seqlens": "n",
    "G": "chrt",
    "inverse": "bthj",
    "states": "chvk",
    "u": "bthv",
}
SIZES = {"T": "k_t"}


@triton.jit
def load_row(d_x, p_x, i_x, o_i, m_t, USE_DESCRIPTORS: tl.constexpr):
    """A number of each token of a chunk."""
    return d_x.load([i_x]) if USE_DESCRIPTORS else tl.load(p_x + o_i, m_t, 0.0)


@triton.jit
def chunk_replay_kernel(
    k,
    v,
    beta,
    initial_state,
    cu_seqlens,
    G,
    inverse,
    states,
    u,
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
    stride_initial_state_n,
    stride_initial_state_h,
    stride_initial_state_v,
    stride_initial_state_k,
    stride_cu_seqlens_n,
    stride_u_b,
    stride_u_t,
    stride_u_h,
    stride_u_v,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
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
    b_S = tl.zeros((BV, BK), tl.float32)
    if HAS_INITIAL_STATE:
        p_S = initial_state + tl.full((), i_n, tl.int64) * stride_initial_state_n
        p_S += i_hv * stride_initial_state_h
        p_S += o_v[:, None] * stride_initial_state_v + o_k[None, :] * stride_initial_state_k
        b_S = tl.load(p_S, m_state, 0.0).to(tl.float32)

    i_first = tl.full((), i_start, tl.int64)
    p_k = k + i_b * stride_k_b + i_first * stride_k_t + i_h * stride_k_h
    p_v = v + i_b * stride_v_b + i_first * stride_v_t + i_hv * stride_v_h
    p_inverse = inverse + ((i_b * T + i_first) * HV + i_hv) * BT
    p_states = states + (i_place * HV + i_hv) * (V * K)
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
        d_k = tl.make_tensor_descriptor(p_k, [rows, K], [stride_k_t, 1], [BT, BK])
        d_v = tl.make_tensor_descriptor(p_v, [rows, V], [stride_v_t, 1], [BT, BV])
        d_inverse = tl.make_tensor_descriptor(p_inverse, [rows, BT], [HV * BT, 1], [BT, BT])
        d_states = tl.make_tensor_descriptor(
            p_states, [tl.cdiv(rows, BT), V, K], [HV * V * K, K, 1], [1, BV, BK]
        )
        places = tl.cdiv(rows, BT) * BT
        d_G = tl.make_tensor_descriptor(p_G, [places * HV * ROWS], [1], [BT])
        # A row of numbers is read from a multiple of 16 bytes on only: others are an illegal
        # instruction on sm_90, and packed sequences start anywhere.
        if HAS_BETA and not IS_VARLEN:
            d_beta = tl.make_tensor_descriptor(p_beta, [i_token + rows], [1], [BT])
    if USE_DESCRIPTOR_STORE:
        p_u = u + i_b * stride_u_b + i_first * stride_u_t + i_hv * stride_u_h
        d_u = tl.make_tensor_descriptor(p_u, [rows, V], [stride_u_t, 1], [BT, BV])
    if HAS_BETA:
        p_beta += i_first * stride_beta_t
    for i_t in range(tl.cdiv(length, BT)):
        i_row = tl.full((), i_t * BT, tl.int64)
        # Addresses are made of it where they are used: kept from chunk to chunk, they would not fit
        # the registers.
        o_t = i_t * BT + o_i
        m_t = o_t < length
        m_v = m_t[:, None] & (o_v < V)[None, :]
        # Transposed, [BV, BT]: the state and what comes of it stay in registers as left operands.
        b_Sd = b_S.to(DOT)
        if USE_DESCRIPTORS:
            d_states.store([i_t, i_v * BV, 0], tl.reshape(b_Sd, (1, BV, BK)))
            b_k = d_k.load([i_t * BT, 0]).to(DOT)
            b_v = d_v.load([i_t * BT, i_v * BV])
            b_X = d_inverse.load([i_t * BT, 0]).to(DOT)
        else:
            tl.store(p_states + i_row // BT * (HV * V * K) + o_state, b_Sd, m_state)
            m_k = m_t[:, None] & (o_k < K)[None, :]
            o_tk = o_t.to(tl.int64)[:, None] * stride_k_t + o_k[None, :] * stride_k_k
            o_tv = o_t.to(tl.int64)[:, None] * stride_v_t + o_v[None, :] * stride_v_v
            o_tt = o_t.to(tl.int64)[:, None] * (HV * BT) + o_i[None, :]
            b_k = tl.load(p_k + o_tk, m_k, 0.0).to(DOT)
            b_v = tl.load(p_v + o_tv, m_v, 0.0)
            b_X = tl.load(p_inverse + o_tt, m_t[:, None], 0.0).to(DOT)
        b_r = tl.dot(b_Sd, tl.trans(b_k), input_precision=PRECISION)

        # A vector is read where it is used, since it takes as many registers as a tile. The norm of
        # k is part of the log decays that end and start at its token.
        i_G = i_t * BT * HV * ROWS
        p_t = p_G + i_row * (HV * ROWS)
        b_last = tl.load(p_t + tl.minimum(length - i_t * BT, BT) - 1) * 1.4426950408889634
        b_G = load_row(d_G, p_t, i_G, o_i, m_t, USE_DESCRIPTORS) * 1.4426950408889634
        b_Gk = b_G
        if USE_QK_L2NORM:
            b_Gk = load_row(d_G, p_t + 2 * BT, i_G + 2 * BT, o_i, m_t, USE_DESCRIPTORS)
            b_Gk *= 1.4426950408889634
            b_G = 2 * b_G - b_Gk
        b_r = tl.trans(b_v).to(tl.float32) - b_r * tl.exp2(b_Gk.to(tl.float32))[None, :]
        if HAS_BETA:
            i_beta = i_token + i_t * BT
            b_beta = load_row(
                d_beta,
                p_beta,
                i_beta,
                o_t.to(tl.int64) * stride_beta_t,
                m_t,
                USE_DESCRIPTORS and not IS_VARLEN,
            )
            b_r *= b_beta.to(tl.float32)[None, :]
        b_u = tl.dot(b_r.to(DOT), tl.trans(b_X), input_precision=PRECISION)
        if USE_DESCRIPTOR_STORE:
            d_u.store([i_t * BT, i_v * BV], tl.trans(b_u).to(u.dtype.element_ty))
        else:
            store_output(
                u,
                (i_b, (i_token + o_t).to(tl.int64)[:, None], i_hv, o_v[None, :]),
                (stride_u_b, stride_u_t, stride_u_h, stride_u_v),
                tl.trans(b_u),
                m_v,
            )
        b_S *= tl.exp2(b_last.to(tl.float32))
        b_u *= tl.exp2((b_last - b_G).to(tl.float32))[None, :]
        b_S = tl.dot(b_u.to(DOT), b_k, b_S, input_precision=PRECISION)
