"""What chunk_backward_gradients_hopper.py leaves out: dbeta of tokens that have next to no weight.

With the state S before the chunk, D_ij = exp(G_i - G_j), and u what each token writes,

    dbeta_i = <dr_i, x_i>,    x_i = v_i - exp(G_i) S k_i - sum_j<i D_ij <k_i, k_j> u_j

and ``u_i = beta_i x_i``, of which the third stage takes x where beta is not less than LEAST_BETA. A
program looks for such tokens in all heads of a chunk, and most often finds none.

Tensors are those of the other stages, and of packed sequences ``places`` of
chunk_backward_places.py. K and V are sizes of tiles.
"""

import triton
import triton.language as tl

from .chunk_prepare import decay_between

# Of less what a token writes has not all digits that bfloat16 has.
LEAST_BETA = tl.constexpr(2.0**-100)


@triton.jit
def chunk_beta_kernel(
    k,
    v,
    beta,
    G,
    places,
    states,
    u,
    dr,
    dbeta,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    """One place of a chunk; the grid is their number."""
    i_place = tl.program_id(0).to(tl.int64)
    if IS_VARLEN:
        i_b = i_place * 0
        i_first = tl.load(places + 2 * i_place).to(tl.int64)
        valid = tl.load(places + 2 * i_place + 1)
    else:
        i_b = i_place // tl.cdiv(T, BT)
        i_first = i_place % tl.cdiv(T, BT) * BT
        valid = (T - i_first).to(tl.int32)
    o_i = tl.arange(0, BT)
    o_h = tl.arange(0, BH)
    m_t = o_i < valid
    p_beta = beta + i_b * stride_beta_b + i_first * stride_beta_t
    o_beta = o_i[:, None] * stride_beta_t + o_h[None, :] * stride_beta_h
    b_beta = tl.load(p_beta + o_beta, m_t[:, None] & (o_h < HV)[None, :], 1.0).to(tl.float32)
    b_small = (tl.abs(b_beta) < LEAST_BETA).to(tl.int32)
    if tl.max(b_small) == 0:
        return
    o_k = tl.arange(0, K)
    o_v = tl.arange(0, V)
    ROWS: tl.constexpr = 3 if USE_QK_L2NORM else 1
    for i_hv in range(HV):
        b_own = tl.max(tl.where(o_h[None, :] == i_hv, b_small, 0), 1)
        if tl.max(b_own) > 0:
            p_G = G + (i_place * HV + i_hv) * (ROWS * BT) + o_i
            b_G = tl.load(p_G, m_t, 0.0) * 1.4426950408889634
            b_Gk = b_G
            if USE_QK_L2NORM:
                b_Gk = tl.load(p_G + 2 * BT, m_t, 0.0) * 1.4426950408889634
            p_k = k + i_b * stride_k_b + i_first * stride_k_t + i_hv // (HV // H) * stride_k_h
            b_k = tl.load(p_k + o_i[:, None] * stride_k_t + o_k[None, :], m_t[:, None], 0.0)
            p_S = states + (i_place * HV + i_hv) * (V * K)
            b_S = tl.load(p_S + o_v[:, None] * K + o_k[None, :])
            p_v = v + i_b * stride_v_b + i_first * stride_v_t + i_hv * stride_v_h
            b_v = tl.load(p_v + o_i[:, None] * stride_v_t + o_v[None, :], m_t[:, None], 0.0)
            o_tv = ((i_b * T + i_first) * HV + i_hv) * V + o_i[:, None] * (HV * V) + o_v[None, :]
            b_u = tl.load(u + o_tv, m_t[:, None], 0.0)
            b_dr = tl.load(dr + o_tv, m_t[:, None], 0.0).to(tl.float32)
            m_lower = o_i[:, None] > o_i[None, :]
            b_D = decay_between(b_Gk[:, None], (2 * b_G - b_Gk)[None, :], m_lower)
            b_A = tl.dot(b_k, tl.trans(b_k)) * b_D
            b_kS = tl.dot(b_k, tl.trans(b_S)) * tl.exp2(b_Gk)[:, None]
            b_x = b_v.to(tl.float32) - b_kS - tl.dot(b_A.to(b_u.dtype), b_u)
            b_dbeta = tl.sum(b_dr * b_x, 1).to(dbeta.dtype.element_ty)
            p_dbeta = dbeta + ((i_b * T + i_first) + o_i) * HV + i_hv
            tl.store(p_dbeta, b_dbeta, m_t & (b_own > 0))
