"""Second stage of the chunked backward on Hopper: chunk_backward_reverse.py's maths, with roles.

    du = (exp(G_last - G) k dS'^T)^T + do^T P           P_ij = scale exp(G_i - G_j) <q_i, k_j>
    dr = du X
    dS = exp(G_last) dS' + (do exp(G) scale)^T q - (dr exp(G) beta) k

Tensors, strides, sizes, tiles and flags are those of chunk_backward_reverse.py, in the same order,
so that one launch serves either kernel, and those of chunk_forget.py: segments of a batch begin
with the chunks after them that the gradient of their last state is made of, of which nothing is
written. This walk begins beside that of chunk_backward_replay_hopper.py, which was launched before
and writes nothing that it reads, and ends after it. The roles of a program, and of which file their
code is:

    walk        a warp group for each 64 of the ``BV`` rows of the gradient of the state
                (chunk_backward_reverse_walk.py)
    weigh       a warp group: P of the next chunk (the same file)
    load        a warp: tiles of the next chunks, by tensor descriptors
    make_gates  a warp: rows of gates (chunk_backward_gates.py)

Bytes of shared memory, with ``BV`` 64 and 128: q and k 98304, do 24576 and 49152, X 24576, P
16384, gradients of states 16384 and 32768, gates 5120; dr takes the place of do. Needs K = V = 128,
chunks of 64 tokens of bfloat16, descriptors, sm_90, and a Triton of ``GLUON`` in chunk_hopper.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .chunk_backward_gates import BT, GATES, ROW, STAGES, make_gates_of_sequence
from .chunk_backward_reverse_walk import walk_high, walk_low, weigh
from .chunk_backward_walk import (
    PLACES,
    TILE,
    addresses_of_gates,
    segment_of_program,
    sequence_of_program,
)
from .chunk_scan_walk import group_barrier, wait_for_kernel_before

# Registers of a thread of the second walk, of ``weigh`` and of the others. The first walk has what
# they leave of 512. With 200 they spill 12 times in loops, with 208 never (Triton 3.6).
REGISTERS = gl.constexpr((208, 72, 24, 24))


@gluon.jit
def load(tiles, gates, bars, sources, sizes, C: gl.constexpr):
    """The role of a warp: tokens and inverses of the chunks, the last one first."""
    HV: gl.constexpr = C[1]
    HALVES: gl.constexpr = C[4]
    s_q, s_k, s_do, s_X = tiles[0], tiles[1], tiles[2], tiles[3]
    full, free = bars[0], bars[1]
    q, k, do, p_X = sources[0]
    i_v, rows, chunks = sizes[0], sizes[1], sizes[3]
    make: gl.constexpr = tma.make_tensor_descriptor
    d_q = make(q[0], [rows, 128], [q[1], 1], [BT, 128], TILE)
    d_k = make(k[0], [rows, 128], [k[1], 1], [BT, 128], TILE)
    d_do = make(do[0], [rows, 128], [do[1], 1], [BT, 64], TILE)
    d_X = make(p_X, [rows, BT], [HV * BT, 1], [BT, BT], TILE)
    for i in range(chunks):
        i_t = (chunks - 1 - i) * BT
        i_place = i % PLACES
        bar = full.index(i_place)
        mbarrier.wait(free.index(i_place), ((i // PLACES) & 1) ^ 1)
        mbarrier.expect(bar, 2 * BT * (2 * 128 + HALVES * 64 + BT))
        tma.async_copy_global_to_shared(d_k, [i_t, 0], bar, s_k.index(i_place))
        tma.async_copy_global_to_shared(d_q, [i_t, 0], bar, s_q.index(i_place))
        for half in gl.static_range(HALVES):
            t_do = s_do.index(HALVES * i_place + half)
            o_v = (i_v * HALVES + half) * 64
            tma.async_copy_global_to_shared(d_do, [i_t, o_v], bar, t_do)
        tma.async_copy_global_to_shared(d_X, [i_t, 0], bar, s_X.index(i_place))
    # The kernel after this one reads what both have written.
    wait_for_kernel_before()


@gluon.jit
def make_gates(tiles, gates, bars, sources, sizes, C: gl.constexpr):
    """The role of a warp: rows of gates."""
    make_gates_of_sequence(gates, sources[1], sizes[2], sizes[3], C, True)


@gluon.jit
def reverse_hopper_kernel(
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
    kept,
    B,
    scale: gl.constexpr,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    HAS_DFINAL_STATE: gl.constexpr,
    HAS_BETA: gl.constexpr,
    HAS_INITIAL_STATE: gl.constexpr,
    IS_VARLEN: gl.constexpr,
    USE_QK_L2NORM: gl.constexpr,
    USE_DESCRIPTORS: gl.constexpr,
    USE_DESCRIPTOR_STORE: gl.constexpr,
    DOT: gl.constexpr,
    PRECISION: gl.constexpr,
    BT: gl.constexpr,
    BK: gl.constexpr,
    BV: gl.constexpr,
    SEGMENTS: gl.constexpr,
    LEAST: gl.constexpr,
    FORGOTTEN: gl.constexpr,
    LOOK: gl.constexpr,
    BN: gl.constexpr,
):
    """One sequence or segment, value head and tile of V; the grid is ``N * HV * cdiv(V, BV)``."""
    gl.static_assert(K == 128 and V == 128 and BT == 64 and (BV == 64 or BV == 128))
    gl.static_assert(USE_DESCRIPTORS and USE_DESCRIPTOR_STORE)
    HALVES: gl.constexpr = BV // 64
    i_v, i_hv, i_n, i_b, i_first, i_place, length = sequence_of_program(
        cu_seqlens, stride_cu_seqlens_n, T, HV, V // BV, IS_VARLEN
    )
    own, m_read, m_write = gl.cdiv(length, BT), True, True
    if SEGMENTS > 1:
        S: gl.constexpr = (SEGMENTS, LEAST, FORGOTTEN, LOOK, BN)
        i_n, first, stop, _, end = segment_of_program(kept, i_n, i_hv, T, B, HV, S, True)
        own, m_read, m_write = end - first, stop == gl.cdiv(T, BT), (first == 0) & (stop > 0)
        i_b = i_n.to(gl.int64)
        i_first = (first * BT).to(gl.int64)
        i_place = i_b * gl.cdiv(T, BT) + first
        length = gl.minimum(T, stop * BT) - first * BT
    i_h = i_hv // (HV // H)
    p_q = q + i_b * stride_q_b + i_first * stride_q_t + i_h * stride_q_h
    p_k = k + i_b * stride_k_b + i_first * stride_k_t + i_h * stride_k_h
    p_do = do + i_b * stride_do_b + i_first * stride_do_t + i_hv * stride_do_h
    p_dr = dr + i_b * stride_dr_b + i_first * stride_dr_t + i_hv * stride_dr_h
    p_X = inverse + ((i_b * T + i_first) * HV + i_hv) * BT
    p_dstates = dstates + (i_place * HV + i_hv) * (V * K)
    beta_strides = (stride_beta_b, stride_beta_t, stride_beta_h)
    of_gates = addresses_of_gates(
        G, beta, beta_strides, i_b, i_first, i_place, i_hv, HV, HAS_BETA, USE_QK_L2NORM
    )
    read, write = (dstates, 0, 0, True), (dstates, True)
    if HAS_DFINAL_STATE:
        p_dS = dfinal_state + i_n.to(gl.int64) * stride_dfinal_state_n
        p_dS += i_hv * stride_dfinal_state_h
        read = (p_dS, stride_dfinal_state_v, stride_dfinal_state_k, m_read)
    if HAS_INITIAL_STATE:
        write = (dinitial_state + (i_n.to(gl.int64) * HV + i_hv) * (V * K), m_write)

    s_q = gl.allocate_shared_memory(DOT, [PLACES, BT, K], TILE)
    s_k = gl.allocate_shared_memory(DOT, [PLACES, BT, K], TILE)
    s_do = gl.allocate_shared_memory(DOT, [PLACES * HALVES, BT, 64], TILE)
    s_X = gl.allocate_shared_memory(DOT, [PLACES, BT, BT], TILE)
    s_P = gl.allocate_shared_memory(DOT, [STAGES, BT, BT], TILE)
    s_dS = gl.allocate_shared_memory(DOT, [HALVES, 64, K], TILE)
    s_gates = gl.allocate_shared_memory(gl.float32, [STAGES * GATES, BT], ROW)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BAR)
    full_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    full_P = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free_P = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(PLACES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=HALVES + 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full_g.index(i), count=1)
        mbarrier.init(free_g.index(i), count=HALVES + 1)
        mbarrier.init(full_P.index(i), count=1)
        mbarrier.init(free_P.index(i), count=1)
    fence_async_shared()
    group_barrier()
    C: gl.constexpr = (
        scale,
        HV,
        HAS_BETA,
        USE_QK_L2NORM,
        HALVES,
        HAS_DFINAL_STATE,
        HAS_INITIAL_STATE,
        SEGMENTS > 1,
    )
    # A descriptor ends where the sequence ends: what is past it reads as zero, and is not written.
    rows = gl.maximum(length, 1)
    args = (
        (s_q, s_k, s_do, s_X, s_P, s_dS),
        (s_gates, full_g, free_g),
        (full, free, full_P, free_P),
        (
            ((p_q, stride_q_t), (p_k, stride_k_t), (p_do, stride_do_t), p_X),
            of_gates,
            (p_dstates, (p_dr, stride_dr_t), read, write),
        ),
        (i_v, rows, length, gl.cdiv(length, BT), own),
        C,
    )
    if HALVES == 1:
        gl.warp_specialize(
            [(walk_low, args), (weigh, args), (load, args), (make_gates, args)],
            [4, 1, 1],
            [96, 32, 32],
        )
    else:
        gl.warp_specialize(
            [
                (walk_low, args),
                (walk_high, args),
                (weigh, args),
                (load, args),
                (make_gates, args),
            ],
            [4, 4, 1, 1],
            REGISTERS,
        )
