"""One kernel of each kind in both layouts of a state, for ``benchmarks.layout`` only.

The same arithmetic: where ``V_MAJOR``, a state is ``[V, K]`` and every product is the transpose of
the one where it is ``[K, V]``.

    q k v g beta o      tokens; in the scan ``g`` is summed from the start of its chunk
    state               [N, HV, V, K] or [N, HV, K, V], updated in place
    inverse             [N, T, HV, BT], ``(I + A)^-1 diag(beta)`` of each chunk, row by row
    BV                  value channels of a program
"""

# ruff: noqa: TID253 -- imported where a row is measured, on a GPU
import triton
import triton.language as tl


@triton.jit
def layout_step_kernel(
    q, k, v, g, beta, state, o,
    scale: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr,
    V_MAJOR: tl.constexpr,
):  # fmt: skip
    """One token of one sequence and value head."""
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_hv = i_nh // HV, i_nh % HV
    i_qk = i_n * H + i_hv // (HV // H)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    b_q = tl.load(q + i_qk * K + o_k).to(tl.float32) * scale
    b_k = tl.load(k + i_qk * K + o_k).to(tl.float32)
    b_v = tl.load(v + i_nh * V + o_v).to(tl.float32)
    b_decay = tl.exp(tl.load(g + i_nh))
    b_beta = tl.load(beta + i_nh)
    p_state = state + i_nh.to(tl.int64) * V * K
    if V_MAJOR:
        p_tile = p_state + o_v[:, None] * K + o_k[None, :]
        b_S = tl.load(p_tile).to(tl.float32) * b_decay
        b_u = b_beta * (b_v - tl.sum(b_S * b_k[None, :], 1))
        b_S += b_u[:, None] * b_k[None, :]
        b_o = tl.sum(b_S * b_q[None, :], 1)
    else:
        p_tile = p_state + o_k[:, None] * V + o_v[None, :]
        b_S = tl.load(p_tile).to(tl.float32) * b_decay
        b_u = b_beta * (b_v - tl.sum(b_S * b_k[:, None], 0))
        b_S += b_k[:, None] * b_u[None, :]
        b_o = tl.sum(b_S * b_q[:, None], 0)
    tl.store(p_tile, b_S.to(state.dtype.element_ty))
    tl.store(o + i_nh * V + o_v, b_o.to(o.dtype.element_ty))


@triton.jit
def layout_scan_kernel(
    q, k, v, g, inverse, state, o,
    T,
    scale: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr,
    V_MAJOR: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """The chunks of one sequence and value head, one after the other; ``T`` is a multiple of BT."""
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_hv = i_nh // HV, i_nh % HV
    i_h = i_hv // (HV // H)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    o_c = tl.arange(0, BT)
    p_state = state + i_nh.to(tl.int64) * V * K
    if V_MAJOR:
        p_tile = p_state + o_v[:, None] * K + o_k[None, :]
    else:
        p_tile = p_state + o_k[:, None] * V + o_v[None, :]
    b_S = tl.load(p_tile).to(tl.float32)
    for t in range(0, T, BT):
        o_t = i_n.to(tl.int64) * T + t + o_c
        b_q = tl.load(q + (o_t[:, None] * H + i_h) * K + o_k[None, :]).to(DOT)
        b_k = tl.load(k + (o_t[:, None] * H + i_h) * K + o_k[None, :]).to(DOT)
        p_v = (o_t[:, None] * HV + i_hv) * V + o_v[None, :]
        b_v = tl.load(v + p_v).to(tl.float32)
        b_I = tl.load(inverse + (o_t[:, None] * HV + i_hv) * BT + o_c[None, :]).to(DOT)
        b_g = tl.load(g + o_t * HV + i_hv)
        b_last = tl.load(g + (i_n.to(tl.int64) * T + t + BT - 1) * HV + i_hv)
        b_decay, b_rest = tl.exp(b_g), tl.exp(b_last - b_g)
        b_D = b_S.to(DOT)
        if V_MAJOR:
            b_x = tl.dot(b_D, tl.trans(b_k), input_precision="ieee")
            b_x = tl.trans(b_v) - b_x * b_decay[None, :]
            b_u = tl.dot(b_x.to(DOT), tl.trans(b_I), input_precision="ieee")
            b_P = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
            m_P = o_c[:, None] <= o_c[None, :]
            b_P *= tl.where(m_P, tl.exp(tl.where(m_P, b_g[None, :] - b_g[:, None], 0)), 0)
            b_o = tl.dot(b_D, tl.trans(b_q), input_precision="ieee") * b_decay[None, :]
            b_o = tl.trans(tl.dot(b_u.to(DOT), b_P.to(DOT), b_o, input_precision="ieee"))
            b_S *= tl.exp(b_last)
            b_u = (b_u * b_rest[None, :]).to(DOT)
            b_S = tl.dot(b_u, b_k, b_S, input_precision="ieee")
        else:
            b_x = tl.dot(b_k, b_D, input_precision="ieee")
            b_x = b_v - b_x * b_decay[:, None]
            b_u = tl.dot(b_I, b_x.to(DOT), input_precision="ieee")
            b_P = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            m_P = o_c[None, :] <= o_c[:, None]
            b_P *= tl.where(m_P, tl.exp(tl.where(m_P, b_g[:, None] - b_g[None, :], 0)), 0)
            b_o = tl.dot(b_q, b_D, input_precision="ieee") * b_decay[:, None]
            b_o = tl.dot(b_P.to(DOT), b_u.to(DOT), b_o, input_precision="ieee")
            b_S *= tl.exp(b_last)
            b_u = (b_u * b_rest[:, None]).to(DOT)
            b_S = tl.dot(tl.trans(b_k), b_u, b_S, input_precision="ieee")
        tl.store(o + p_v, (b_o * scale).to(o.dtype.element_ty))
    tl.store(p_tile, b_S.to(state.dtype.element_ty))
