"""The roles of chunk_backward_reverse_hopper.py that multiply: those of states, and of tokens."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .chunk_backward_gates import (
    BETA,
    BT,
    FROM,
    GATES,
    LAST,
    STAGES,
    TAIL,
    THROUGH_K,
    THROUGH_Q,
    TO_Q,
)
from .chunk_backward_walk import PLACES, STATE, TILE, TILE_3
from .chunk_scan_walk import SA, SC, SL, SR, XA, XC, XL, XR, group_barrier


@gluon.jit
def weigh(tiles, gates, bars, sources, sizes, C: gl.constexpr):
    """The role of a warp group: what a token's output has of what others write, P."""
    HALVES: gl.constexpr = C[4]
    s_q, s_k, s_P = tiles[0], tiles[1], tiles[4]
    s_gates, full_g, free_g = gates
    full, free, full_P, free_P = bars
    chunks = sizes[3]
    DOT: gl.constexpr = s_k.dtype
    # Of a known zero the compiler would choose after rounding, with halves of registers.
    zero = gl.where(chunks < 0, 1.0, 0.0)
    b_zero = gl.zeros((BT, BT), gl.float32, XL)
    o_r = gl.arange(0, BT, layout=XR)[:, None]
    o_c = gl.arange(0, BT, layout=XC)[None, :]
    for i in range(chunks):
        i_place, i_stage = i % PLACES, i % STAGES
        i_gate = i_stage * GATES
        i_phase = (i // STAGES) & 1
        mbarrier.wait(full.index(i_place), (i // PLACES) & 1)
        t_q, t_k = s_q.index(i_place), s_k.index(i_place)
        b_P = warpgroup_mma(t_q, t_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        mbarrier.wait(full_g.index(i_stage), i_phase)
        b_to = s_gates.index(i_gate + TO_Q).load(XR)
        b_D = gl.exp2(b_to[:, None] - s_gates.index(i_gate + FROM).load(XC)[None, :])
        b_P = warpgroup_mma_wait(0, deps=(b_P,))
        b_P = gl.where(o_r >= o_c, b_P * b_D, zero)
        # The place is free, as that of the gates was, and needs no barrier. But with one, machine
        # code for one walk comes out that takes 189 us for 8192 tokens, without 220 (H200, Triton
        # 3.6, 2026-11-30); for two it would spill in loops.
        if HALVES == 1:
            mbarrier.wait(free_P.index(i_stage), i_phase ^ 1)
        s_P.index(i_stage).store(b_P.to(DOT))
        fence_async_shared()
        group_barrier()
        mbarrier.arrive(full_P.index(i_stage), count=1)
        mbarrier.arrive(free.index(i_place), count=1)
        mbarrier.arrive(free_g.index(i_stage), count=1)


@gluon.jit
def walk(tiles, gates, bars, sources, sizes, C: gl.constexpr, HALF: gl.constexpr):
    """The role of a warp group: 64 rows of the gradient, from the last chunk to the first."""
    HV: gl.constexpr = C[1]
    HALVES: gl.constexpr = C[4]
    HAS_DFINAL_STATE: gl.constexpr = C[5]
    HAS_INITIAL_STATE: gl.constexpr = C[6]
    IS_SEGMENT: gl.constexpr = C[7]
    s_q, s_k, s_do, s_X, s_P, s_dS = tiles
    s_gates, full_g, free_g = gates
    full, free, full_P, free_P = bars
    p_dstates, dr, read, write = sources[2]
    i_v, rows, _, chunks, own = sizes
    DOT: gl.constexpr = s_k.dtype
    make: gl.constexpr = tma.make_tensor_descriptor
    if IS_SEGMENT:
        rows = gl.maximum(gl.minimum(rows, own * BT), 1)
    places = gl.cdiv(rows, BT)
    d_dS = make(p_dstates, [places, 128, 128], [HV * 16384, 128, 1], STATE, TILE_3)
    d_dr = make(dr[0], [rows, 128], [dr[1], 1], [BT, 64], TILE)
    b_zero = gl.zeros((64, BT), gl.float32, XL)
    b_dS = gl.zeros((64, 128), gl.float32, SL)
    i_first = (i_v * HALVES + HALF) * 64
    o_v = i_first + gl.arange(0, 64, layout=SR)
    o_k = gl.arange(0, 128, layout=SC)
    if HAS_DFINAL_STATE:
        p_dS, stride_v, stride_k, m_read = read
        p_dS += o_v[:, None] * stride_v + o_k[None, :] * stride_k
        b_dS = gl.load(p_dS, m_read, 0.0).to(gl.float32)
    t_dS = s_dS.index(HALF)
    for i in range(chunks):
        i_t = chunks - 1 - i
        if IS_SEGMENT:
            # Of chunks after its own nothing is written: past the end.
            i_t = gl.where(i_t < own, i_t, chunks)
        i_place, i_stage = i % PLACES, i % STAGES
        i_gate = i_stage * GATES
        i_phase = (i // STAGES) & 1
        t_q, t_k = s_q.index(i_place), s_k.index(i_place)
        # Rows of V; when they are read, dr takes their place.
        t_dr = s_do.index(HALVES * i_place + HALF)
        t_do = t_dr.permute((1, 0))
        mbarrier.wait(full.index(i_place), (i // PLACES) & 1)
        mbarrier.wait(full_g.index(i_stage), i_phase)
        b_dSd = b_dS.to(DOT)
        # Behind the product that is next ptxas would have all products waited for (C7517), 4 % of
        # 8192 tokens (H200, Triton 3.6, 2026-11-30).
        b_dS = b_dS * s_gates.index(i_gate + LAST).load(SR)[:, None]
        a_dS = gl.convert_layout(b_dSd, XA)
        b_du = warpgroup_mma(a_dS, t_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        mbarrier.wait(full_P.index(i_stage), i_phase)
        b_doP = warpgroup_mma(t_do, s_P.index(i_stage), b_zero, use_acc=False, is_async=True)
        # The gradient of the state leaves; that of the chunk after has been read, and its dr.
        tma.store_wait(0)
        group_barrier()
        t_dS.store(b_dSd)
        fence_async_shared()
        group_barrier()
        # Every warp has left the chunk before.
        i_other = (i + 1) % STAGES
        mbarrier.arrive(free.index((i + PLACES - 1) % PLACES), count=1, pred=i > 0)
        mbarrier.arrive(free_g.index(i_other), count=1, pred=i > 0)
        if HALVES == 1:
            mbarrier.arrive(free_P.index(i_other), count=1, pred=i > 0)
        t_dS3 = t_dS._reinterpret(DOT, STATE, TILE_3)
        tma.async_copy_shared_to_global(d_dS, [i_t, i_first, 0], t_dS3)
        b_do = t_do.load(XL).to(gl.float32)
        b_do = b_do * s_gates.index(i_gate + THROUGH_Q).load(XC)[None, :]
        a_do = gl.convert_layout(b_do.to(DOT), SA)
        b_du, b_doP = warpgroup_mma_wait(0, deps=(b_du, b_doP))
        b_dS = warpgroup_mma(a_do, t_q, b_dS, is_async=True)
        b_du = b_du * s_gates.index(i_gate + TAIL).load(XC)[None, :] + b_doP
        a_du = gl.convert_layout(b_du.to(DOT), XA)
        b_dr = warpgroup_mma(a_du, s_X.index(i_place), b_zero, use_acc=False, is_async=True)
        b_from = s_gates.index(i_gate + THROUGH_K).load(XC)
        b_from = b_from * s_gates.index(i_gate + BETA).load(XC)
        b_dS, b_dr = warpgroup_mma_wait(0, deps=(b_dS, b_dr))
        b_drd = b_dr.to(DOT)
        a_dr = gl.convert_layout((b_dr * b_from[None, :]).to(DOT), SA)
        b_dS = warpgroup_mma(a_dr, t_k, b_dS, is_async=True)
        # Every warp has multiplied its do.
        group_barrier()
        t_do.store(b_drd)
        fence_async_shared()
        group_barrier()
        tma.async_copy_shared_to_global(d_dr, [i_t * BT, i_first], t_dr)
        b_dS = warpgroup_mma_wait(0, deps=(b_dS,))
    if HAS_INITIAL_STATE:
        p_dS, m_write = write
        p_dS += o_v[:, None] * 128 + o_k[None, :]
        gl.store(p_dS, b_dS.to(p_dS.dtype.element_ty), m_write)
    tma.store_wait(0)


@gluon.jit
def walk_low(tiles, gates, bars, sources, sizes, C: gl.constexpr):
    """The first 64 rows."""
    walk(tiles, gates, bars, sources, sizes, C, 0)


@gluon.jit
def walk_high(tiles, gates, bars, sources, sizes, C: gl.constexpr):
    """The other 64 rows."""
    walk(tiles, gates, bars, sources, sizes, C, 1)
