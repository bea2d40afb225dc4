"""The roles of chunk_backward_gradients_hopper.py that do not multiply: they load, and finish."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .chunk_backward_beta import LEAST_BETA
from .chunk_backward_gates import BETA, BT, GATES, LANES, LAST, STAGES, load_gates, store_gates
from .chunk_backward_gradients_products import (
    BY_BETA,
    BY_TAIL,
    BY_TOKEN,
    PLACES,
    SUMS,
    TILE,
    place_of_tile,
)
from .chunk_scan_walk import group_barrier, plus, tile_layout

# A tile of tokens as descriptors of four dimensions have it.
BOX, TILE_4 = gl.constexpr([1, 64, 1, 128]), gl.constexpr(tile_layout(4))
# 64 columns of a tile in a warp group, 16 bytes a lane at once; rows and columns.
VL = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
VR, VC = (gl.constexpr(gl.SliceLayout(n, VL)) for n in (1, 0))
# Rows of a tile in a warp, as many as its registers hold.
PART, PL = gl.constexpr(16), gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [1, 1], [1, 0]))


@gluon.jit
def make_gates(tiles, gates, bars, tokens, sizes, C: gl.constexpr):
    """The role of a warp: rows of gates of each value head."""
    scale: gl.constexpr = C[0]
    R: gl.constexpr = C[2]
    HV: gl.constexpr = C[3]
    HAS_BETA: gl.constexpr = C[4]
    NORMS: gl.constexpr = C[5]
    ROWS: gl.constexpr = 3 if NORMS else 1
    p_G, beta, stride_b, stride_t, stride_h = tokens[8]
    _, _, _, _, _, count, _, _ = sizes
    for n in range(count):
        i_b, i_place, i_t, valid, i_h = place_of_tile(sizes, n, C)
        for r in range(R):
            j = n * R + r
            i_hv = i_h * R + r
            p_row = p_G + (i_place.to(gl.int64) * HV + i_hv) * (ROWS * BT)
            p_beta = beta
            if HAS_BETA:
                p_beta += i_b.to(gl.int64) * stride_b + i_t.to(gl.int64) * stride_t
                p_beta += i_hv * stride_h
            b_gates = load_gates(p_row, p_beta, stride_t, valid, HAS_BETA, NORMS, C[6])
            store_gates((gates[0], bars[0][4], bars[0][5]), j, b_gates, scale, NORMS)


@gluon.jit
def ask_for_heads(d_q, d_k, tiles, bars, sizes, n, C: gl.constexpr):
    """Queries and keys of tile ``n``."""
    s_q, s_k = tiles[0], tiles[1]
    full_qk, free_qk = bars[0][0], bars[0][1]
    i_b, _i_place, i_t, _valid, i_h = place_of_tile(sizes, n, C)
    i_qk = n % STAGES
    bar = full_qk.index(i_qk)
    mbarrier.wait(free_qk.index(i_qk), ((n // STAGES) & 1) ^ 1)
    mbarrier.expect(bar, 2 * BT * 128 * 2)
    t_q = s_q.index(i_qk)._reinterpret(s_q.dtype, BOX, TILE_4)
    t_k = s_k.index(i_qk)._reinterpret(s_q.dtype, BOX, TILE_4)
    tma.async_copy_global_to_shared(d_q, [i_b, i_t, i_h, 0], bar, t_q)
    tma.async_copy_global_to_shared(d_k, [i_b, i_t, i_h, 0], bar, t_k)


@gluon.jit
def ask_for_tokens(d_x, i_b, i_t, i_hv, s_tokens, full_t, free_t, i):
    """The ``i``-th tile of tokens."""
    bar = full_t.index(i % PLACES)
    mbarrier.wait(free_t.index(i % PLACES), ((i // PLACES) & 1) ^ 1)
    mbarrier.expect(bar, BT * 128 * 2)
    t_x = s_tokens.index(i % PLACES)._reinterpret(s_tokens.dtype, BOX, TILE_4)
    tma.async_copy_global_to_shared(d_x, [i_b, i_t, i_hv, 0], bar, t_x)


@gluon.jit
def ask_for_state(d_S, i_row, t_S, full, free, j):
    """The state whose first row this is."""
    mbarrier.wait(free, (j & 1) ^ 1)
    mbarrier.expect(full, 128 * 128 * 2)
    tma.async_copy_global_to_shared(d_S, [i_row, 0], full, t_S)


@gluon.jit
def load(tiles, gates, bars, tokens, sizes, C: gl.constexpr):
    """The role of a warp: all tiles, in the order in which their places become free."""
    R: gl.constexpr = C[2]
    HV: gl.constexpr = C[3]
    s_tokens, t_S, t_dS = tiles[3], tiles[4].index(0), tiles[5].index(0)
    full_t, free_t = bars[0][2], bars[0][3]
    full_S, free_S, full_dS, free_dS = bars[1][0], bars[1][1], bars[1][2], bars[1][3]
    q, k, do, writes, states = tokens[0], tokens[1], tokens[2], tokens[3], tokens[4]
    B, T, H, chunks, _, count, _, _ = sizes
    make: gl.constexpr = tma.make_tensor_descriptor
    sv = HV * 128
    d_do = make(do, [B, T, HV, 128], [T * sv, sv, 128, 1], BOX, TILE_4)
    # u, then dr; states, then their gradients.
    d_writes = make(writes, [2 * B, T, HV, 128], [T * sv, sv, 128, 1], BOX, TILE_4)
    d_S = make(states, [2 * B * chunks * sv, 128], [128, 1], [128, 128], TILE)
    d_k = make(k[0], [B, T, H, 128], [k[1], k[2], k[3], 1], BOX, TILE_4)
    d_q = make(q[0], [B, T, H, 128], [q[1], q[2], q[3], 1], BOX, TILE_4)
    if count > 0:
        ask_for_heads(d_q, d_k, tiles, bars, sizes, 0, C)
    for n in range(count):
        i_b, i_place, i_t, _valid, i_h = place_of_tile(sizes, n, C)
        for r in range(R):
            j = n * R + r
            i_hv = i_h * R + r
            ask_for_tokens(d_do, i_b, i_t, i_hv, s_tokens, full_t, free_t, 3 * j)
            ask_for_tokens(d_writes, B + i_b, i_t, i_hv, s_tokens, full_t, free_t, 3 * j + 1)
            ask_for_tokens(d_writes, i_b, i_t, i_hv, s_tokens, full_t, free_t, 3 * j + 2)
            i_row = (i_place * HV + i_hv) * 128
            ask_for_state(d_S, i_row, t_S, full_S, free_S, j)
            ask_for_state(d_S, i_row + B * chunks * sv, t_dS, full_dS, free_dS, j)
            if (r == 0) & (n + 1 < count):
                ask_for_heads(d_q, d_k, tiles, bars, sizes, n + 1, C)


@gluon.jit
def inner_of_states(t_S, t_dS):
    """``<S, dS>`` as a row of 64 numbers."""
    b_sum = gl.zeros((BT,), gl.float32, VR)
    for i in gl.static_range(4):
        t_S0 = t_S.slice(i // 2 * 64, 64).slice(i % 2 * 64, 64, dim=1)
        t_dS0 = t_dS.slice(i // 2 * 64, 64).slice(i % 2 * 64, 64, dim=1)
        b_sum += gl.sum(t_S0.load(VL).to(gl.float32) * t_dS0.load(VL).to(gl.float32), 1)
    return b_sum


@gluon.jit
def sum_states(tiles, gates, bars, tokens, sizes, C: gl.constexpr):
    """The role of a warp group: what needs no product, dv and ``<S, dS>``."""
    R: gl.constexpr = C[2]
    HV: gl.constexpr = C[3]
    s_tokens, t_S, t_dS = tiles[3], tiles[4].index(0), tiles[5].index(0)
    s_gates, t_state = gates[0], gates[3]
    full_t, free_t, full_g, free_g = bars[0][2], bars[0][3], bars[0][4], bars[0][5]
    full_S, free_S, full_dS, free_dS = bars[1][0], bars[1][1], bars[1][2], bars[1][3]
    full_p, free_p = bars[1][4], bars[1][5]
    p_dv = tokens[7]
    _, T, _, _, _, count, _, _ = sizes
    o_i = gl.arange(0, BT, layout=VR)[:, None]
    o_v = gl.arange(0, 64, layout=VC)[None, :]
    for n in range(count):
        i_b, _i_place, i_t, valid, i_h = place_of_tile(sizes, n, C)
        m_t = o_i < valid
        p_o = p_dv + ((i_b.to(gl.int64) * T + i_t) * HV + i_h * R) * 128
        for r in range(R):
            j = n * R + r
            i_gate = j % STAGES * GATES
            i_dr = 3 * j + 1
            mbarrier.wait(full_g.index(j % STAGES), (j // STAGES) & 1)
            b_beta = s_gates.index(i_gate + BETA).load(VR)
            b_last = s_gates.index(i_gate + LAST).load(VR)
            # Of all tiles, in turn: a barrier tells a phase from the one before alone.
            for i in gl.static_range(3):
                mbarrier.wait(full_t.index((3 * j + i) % PLACES), ((3 * j + i) // PLACES) & 1)
            for half in gl.static_range(2):
                t_dr = s_tokens.index(i_dr % PLACES).slice(half * 64, 64, dim=1)
                b_dv = (t_dr.load(VL).to(gl.float32) * b_beta[:, None]).to(p_dv.dtype.element_ty)
                gl.store(p_o + (o_i * (HV * 128) + o_v + half * 64), b_dv, m_t)
            p_o += 128
            group_barrier()
            for i in gl.static_range(3):
                mbarrier.arrive(free_t.index((3 * j + i) % PLACES), count=1)
            mbarrier.arrive(free_g.index(j % STAGES), count=1)
            mbarrier.wait(full_S, j & 1)
            mbarrier.wait(full_dS, j & 1)
            b_state = inner_of_states(t_S, t_dS) * b_last
            mbarrier.wait(free_p, (j & 1) ^ 1)
            t_state.store(b_state)
            group_barrier()
            mbarrier.arrive(full_p, count=1)
            mbarrier.arrive(free_S, count=1)
            mbarrier.arrive(free_dS, count=1)


@gluon.jit
def load_sum(s_sums, i: gl.constexpr):
    """A row of sums of both groups."""
    return s_sums.index(i).load(LANES) + s_sums.index(SUMS + i).load(LANES)


@gluon.jit
def store_rows(p_x, stride_t, t_x, valid):
    """The first rows of a tile."""
    o_i = gl.arange(0, PART, layout=gl.SliceLayout(1, PL))[:, None]
    o_k = gl.arange(0, 128, layout=gl.SliceLayout(0, PL))[None, :]
    for part in gl.static_range(BT // PART):
        o_t = part * PART + o_i
        b_x = t_x.slice(part * PART, PART).load(PL)
        gl.store(p_x + (o_t * stride_t + o_k), b_x, o_t < valid)


@gluon.jit
def finish(tiles, gates, bars, tokens, sizes, C: gl.constexpr):
    """The role of a warp: dg and dbeta of each value head, of what others have summed.

    What G of a token multiplies or divides is part of dg from the first token of the chunk to this
    one: but for the decays to the end of the chunk, those of the tokens after.
    """
    HAS_G: gl.constexpr = C[1]
    R: gl.constexpr = C[2]
    HV: gl.constexpr = C[3]
    HAS_BETA: gl.constexpr = C[4]
    IS_VARLEN: gl.constexpr = C[6]
    s_gates, s_sums, t_state = gates[0], gates[1], gates[3]
    free_g = bars[0][5]
    full_p, free_p = bars[1][4], bars[1][5]
    full_o, free_qk = bars[1][8], bars[0][1]
    dq, dk = tokens[5], tokens[6]
    p_dg, p_dbeta = tokens[9]
    B, T, H, _, _, count, _, _ = sizes
    s_q, s_k = tiles[0], tiles[1]
    make: gl.constexpr = tma.make_tensor_descriptor
    d_dq = make(dq[0], [B, T, H, 128], [dq[1], dq[2], dq[3], 1], BOX, TILE_4)
    d_dk = make(dk[0], [B, T, H, 128], [dk[1], dk[2], dk[3], 1], BOX, TILE_4)
    o_i = gl.arange(0, BT, layout=LANES)
    for n in range(count):
        i_b, _i_place, i_t, valid, i_h = place_of_tile(sizes, n, C)
        m_t = o_i < valid
        o_t = ((i_b.to(gl.int64) * T + i_t) * HV + i_h * R) + o_i * HV
        for r in range(R):
            j = n * R + r
            mbarrier.wait(full_p, j & 1)
            b_dG = gl.where(m_t, load_sum(s_sums, BY_TOKEN), 0.0)
            b_end = gl.where(m_t, load_sum(s_sums, BY_TAIL), 0.0) + t_state.load(LANES)
            b_own = s_sums.index(SUMS + BY_BETA).load(LANES)
            b_beta = s_gates.index(j % STAGES * GATES + BETA).load(LANES)
            group_barrier()
            mbarrier.arrive(free_p, count=1)
            mbarrier.arrive(free_g.index(j % STAGES), count=1)
            if HAS_BETA:
                # Of what has no weight chunk_backward_beta.py knows more.
                b_dbeta = gl.where(gl.abs(b_beta) < LEAST_BETA, 0.0, b_own / b_beta)
                gl.store(p_dbeta + o_t, b_dbeta.to(p_dbeta.dtype.element_ty), m_t)
            if HAS_G:
                b_dg = gl.associative_scan(b_dG, 0, plus, reverse=True) + gl.sum(b_end, 0)
                gl.store(p_dg + o_t, b_dg, m_t)
            o_t += 1
        mbarrier.wait(full_o.index(n % STAGES), (n // STAGES) & 1)
        t_dq, t_dk = s_q.index(n % STAGES), s_k.index(n % STAGES)
        if IS_VARLEN and valid < BT:
            # The rows after are another sequence's.
            o_row = (i_t.to(gl.int64) * H + i_h) * 128
            store_rows(dq[0] + o_row, H * 128, t_dq, valid)
            store_rows(dk[0] + o_row, H * 128, t_dk, valid)
            group_barrier()
        else:
            box_dq = t_dq._reinterpret(s_q.dtype, BOX, TILE_4)
            box_dk = t_dk._reinterpret(s_q.dtype, BOX, TILE_4)
            tma.async_copy_shared_to_global(d_dq, [i_b, i_t, i_h, 0], box_dq)
            tma.async_copy_shared_to_global(d_dk, [i_b, i_t, i_h, 0], box_dk)
            tma.store_wait(0)
        mbarrier.arrive(free_qk.index(n % STAGES), count=1)
