"""First stage of the chunked backward on Hopper: chunk_backward_replay.py's maths, with roles.

    r  = (v^T - exp(G) (S k^T)) beta
    u  = r X^T
    S' = exp(G_last) S + (u exp(G_last - G)) k

Tensors, strides, sizes, tiles and flags are those of chunk_backward_replay.py, in the same order,
so that one launch serves either kernel, and those of chunk_forget.py: segments of a batch begin
with the chunks that their states are made of, of which nothing is written. The roles of a program,
as of chunk_scan_hopper.py:

    walk        a warp group for each 64 of the ``BV`` rows of the state
    load        a warp: tiles of the next chunks, by tensor descriptors
    make_gates  a warp: rows of gates (chunk_backward_gates.py)

Each chunk's state leaves while its first product runs, and with it what the chunk before wrote. The
walk of chunk_backward_reverse_hopper.py, which reads nothing of this one, begins beside it.

Bytes of shared memory, with ``BV`` 64 and 128: k 49152, v 24576 and 49152, X 24576, states 16384
and 32768, u 8192 and 16384, gates 5120. Needs K = V = 128, chunks of 64 tokens of bfloat16,
descriptors, sm_90, and a Triton of ``GLUON`` in chunk_hopper.py.
"""

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
    GATES,
    LAST,
    ROW,
    STAGES,
    TAIL,
    THROUGH_K,
    make_gates_of_sequence,
)
from .chunk_backward_walk import (
    PLACES,
    STATE,
    TILE,
    TILE_3,
    addresses_of_gates,
    segment_of_program,
    sequence_of_program,
)
from .chunk_scan_walk import SA, SC, SL, SR, XA, XC, XL, group_barrier, start_next


@gluon.jit
def load(tiles, gates, bars, sources, sizes, C: gl.constexpr):
    """The role of a warp: keys, values and inverses of the chunks."""
    HALVES: gl.constexpr = C[4]
    HV: gl.constexpr = C[1]
    s_k, s_v, s_X, _, _ = tiles
    full, free = bars
    k, v, p_X = sources[0]
    i_v, rows, _, chunks, _ = sizes
    make: gl.constexpr = tma.make_tensor_descriptor
    d_k = make(k[0], [rows, 128], [k[1], 1], [BT, 128], TILE)
    d_v = make(v[0], [rows, 128], [v[1], 1], [BT, 64], TILE)
    d_X = make(p_X, [rows, BT], [HV * BT, 1], [BT, BT], TILE)
    for i in range(chunks):
        i_place = i % PLACES
        bar = full.index(i_place)
        mbarrier.wait(free.index(i_place), ((i // PLACES) & 1) ^ 1)
        mbarrier.expect(bar, 2 * BT * (128 + HALVES * 64 + BT))
        tma.async_copy_global_to_shared(d_k, [i * BT, 0], bar, s_k.index(i_place))
        for half in gl.static_range(HALVES):
            t_v = s_v.index(HALVES * i_place + half)
            o_v = (i_v * HALVES + half) * 64
            tma.async_copy_global_to_shared(d_v, [i * BT, o_v], bar, t_v)
        tma.async_copy_global_to_shared(d_X, [i * BT, 0], bar, s_X.index(i_place))


@gluon.jit
def make_gates(tiles, gates, bars, sources, sizes, C: gl.constexpr):
    """The role of a warp: rows of gates."""
    make_gates_of_sequence(gates, sources[1], sizes[2], sizes[3], C, False)


@gluon.jit
def walk(tiles, gates, bars, sources, sizes, C: gl.constexpr, HALF: gl.constexpr):
    """The role of a warp group: 64 rows of the state, from the first chunk to the last."""
    HV: gl.constexpr = C[1]
    HALVES: gl.constexpr = C[4]
    HAS_STATE: gl.constexpr = C[5]
    IS_SEGMENT: gl.constexpr = C[6]
    s_k, s_v, s_X, s_S, s_u = tiles
    s_gates, full_g, free_g = gates
    full, free = bars
    p_states, u, read = sources[2]
    i_v, rows, _, chunks, i_own = sizes
    DOT: gl.constexpr = s_k.dtype
    make: gl.constexpr = tma.make_tensor_descriptor
    rows = rows - i_own * BT
    places = gl.cdiv(rows, BT)
    d_S = make(p_states, [places, 128, 128], [HV * 16384, 128, 1], STATE, TILE_3)
    d_u = make(u[0], [rows, 128], [u[1], 1], [BT, 64], TILE)
    b_zero = gl.zeros((64, BT), gl.float32, XL)
    b_S = gl.zeros((64, 128), gl.float32, SL)
    i_first = (i_v * HALVES + HALF) * 64
    if HAS_STATE:
        p_S, stride_v, stride_k, m_read = read
        o_v = i_first + gl.arange(0, 64, layout=SR)
        o_k = gl.arange(0, 128, layout=SC)
        p_S += o_v[:, None] * stride_v + o_k[None, :] * stride_k
        b_S = gl.load(p_S, m_read, 0.0).to(gl.float32)
    t_S, t_u = s_S.index(HALF), s_u.index(HALF)
    # What the chunk before wrote, rounded: of a sum ptxas would have every product waited for.
    b_ud = b_zero.to(DOT)
    for i in range(chunks):
        i_place, i_stage = i % PLACES, i % STAGES
        i_gate = i_stage * GATES
        mbarrier.wait(full.index(i_place), (i // PLACES) & 1)
        t_k = s_k.index(i_place)
        b_Sd = b_S.to(DOT)
        a_S = gl.convert_layout(b_Sd, XA)
        b_x = warpgroup_mma(a_S, t_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        # Of the state and the writes before: their shared memory must have been read.
        tma.store_wait(0)
        group_barrier()
        t_S.store(b_Sd)
        t_u.permute((1, 0)).store(b_ud)
        fence_async_shared()
        group_barrier()
        # Every warp has left the chunk before.
        mbarrier.arrive(free.index((i + PLACES - 1) % PLACES), count=1, pred=i > 0)
        mbarrier.arrive(free_g.index((i + 1) % STAGES), count=1, pred=i > 0)
        t_S3 = t_S._reinterpret(DOT, STATE, TILE_3)
        i_store = i
        if IS_SEGMENT:
            i_store = gl.where(i >= i_own, i - i_own, chunks)
        tma.async_copy_shared_to_global(d_S, [i_store, i_first, 0], t_S3)
        # Before the first own chunk past the end, where nothing is written.
        i_before = gl.where(i > i_own, i - 1 - i_own, chunks)
        tma.async_copy_shared_to_global(d_u, [i_before * BT, i_first], t_u)
        mbarrier.wait(full_g.index(i_stage), (i // STAGES) & 1)
        b_x = warpgroup_mma_wait(0, deps=(b_x,))
        b_v = s_v.index(HALVES * i_place + HALF).permute((1, 0)).load(XL)
        b_x = b_x * s_gates.index(i_gate + THROUGH_K).load(XC)[None, :] + b_v.to(gl.float32)
        b_x = b_x * s_gates.index(i_gate + BETA).load(XC)[None, :]
        a_x = gl.convert_layout(b_x.to(DOT), XA)
        t_X = s_X.index(i_place).permute((1, 0))
        b_u = warpgroup_mma(a_x, t_X, b_zero, use_acc=False, is_async=True)
        b_S = b_S * s_gates.index(i_gate + LAST).load(SR)[:, None]
        b_u = warpgroup_mma_wait(0, deps=(b_u,))
        b_ud = b_u.to(DOT)
        b_u = b_u * s_gates.index(i_gate + TAIL).load(XC)[None, :]
        a_u = gl.convert_layout(b_u.to(DOT), SA)
        b_S = warpgroup_mma(a_u, t_k, b_S, is_async=True)
        b_S = warpgroup_mma_wait(0, deps=(b_S,))
    # The tokens of an empty sequence may begin where no memory is, which no descriptor may name.
    if chunks > 0:
        tma.store_wait(0)
        group_barrier()
        t_u.permute((1, 0)).store(b_ud)
        fence_async_shared()
        group_barrier()
        tma.async_copy_shared_to_global(d_u, [(chunks - 1 - i_own) * BT, i_first], t_u)
    tma.store_wait(0)


@gluon.jit
def walk_low(tiles, gates, bars, sources, sizes, C: gl.constexpr):
    """The first 64 rows."""
    walk(tiles, gates, bars, sources, sizes, C, 0)


@gluon.jit
def walk_high(tiles, gates, bars, sources, sizes, C: gl.constexpr):
    """The other 64 rows."""
    walk(tiles, gates, bars, sources, sizes, C, 1)


@gluon.jit
def replay_hopper_kernel(
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
    kept,
    B,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
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
    start_next()
    HALVES: gl.constexpr = BV // 64
    i_v, i_hv, i_n, i_b, i_first, i_place, length = sequence_of_program(
        cu_seqlens, stride_cu_seqlens_n, T, HV, V // BV, IS_VARLEN
    )
    i_own, m_read = 0, True
    if SEGMENTS > 1:
        S: gl.constexpr = (SEGMENTS, LEAST, FORGOTTEN, LOOK, BN)
        i_n, begin, stop, first, _ = segment_of_program(kept, i_n, i_hv, T, B, HV, S, False)
        i_own, m_read = first - begin, begin == 0
        i_b = i_n.to(gl.int64)
        i_first = (begin * BT).to(gl.int64)
        i_place = i_b * gl.cdiv(T, BT) + begin
        length = gl.minimum(T, stop * BT) - begin * BT
    i_h = i_hv // (HV // H)
    p_k = k + i_b * stride_k_b + i_first * stride_k_t + i_h * stride_k_h
    p_v = v + i_b * stride_v_b + i_first * stride_v_t + i_hv * stride_v_h
    p_u = u + i_b * stride_u_b + (i_first + i_own * BT) * stride_u_t + i_hv * stride_u_h
    p_X = inverse + ((i_b * T + i_first) * HV + i_hv) * BT
    p_states = states + ((i_place + i_own) * HV + i_hv) * (V * K)
    beta_strides = (stride_beta_b, stride_beta_t, stride_beta_h)
    of_gates = addresses_of_gates(
        G, beta, beta_strides, i_b, i_first, i_place, i_hv, HV, HAS_BETA, USE_QK_L2NORM
    )
    read = (states, 0, 0, True)
    if HAS_INITIAL_STATE:
        p_S = initial_state + i_n.to(gl.int64) * stride_initial_state_n
        p_S += i_hv * stride_initial_state_h
        read = (p_S, stride_initial_state_v, stride_initial_state_k, m_read)

    s_k = gl.allocate_shared_memory(DOT, [PLACES, BT, K], TILE)
    s_v = gl.allocate_shared_memory(DOT, [PLACES * HALVES, BT, 64], TILE)
    s_X = gl.allocate_shared_memory(DOT, [PLACES, BT, BT], TILE)
    s_S = gl.allocate_shared_memory(DOT, [HALVES, 64, K], TILE)
    s_u = gl.allocate_shared_memory(DOT, [HALVES, BT, 64], TILE)
    s_gates = gl.allocate_shared_memory(gl.float32, [STAGES * GATES, BT], ROW)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BAR)
    full_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(PLACES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=HALVES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full_g.index(i), count=1)
        mbarrier.init(free_g.index(i), count=HALVES)
    fence_async_shared()
    group_barrier()
    C: gl.constexpr = (1.0, HV, HAS_BETA, USE_QK_L2NORM, HALVES, HAS_INITIAL_STATE, SEGMENTS > 1)
    # A descriptor ends where the sequence ends: what is past it reads as zero, and is not written.
    rows = gl.maximum(length, 1)
    args = (
        (s_k, s_v, s_X, s_S, s_u),
        (s_gates, full_g, free_g),
        (full, free),
        (
            ((p_k, stride_k_t), (p_v, stride_v_t), p_X),
            of_gates,
            (p_states, (p_u, stride_u_t), read),
        ),
        (i_v, rows, length, gl.cdiv(length, BT), i_own),
        C,
    )
    if HALVES == 1:
        gl.warp_specialize([(walk_low, args), (load, args), (make_gates, args)], [1, 1], [24, 24])
    else:
        gl.warp_specialize(
            [(walk_low, args), (walk_high, args), (load, args), (make_gates, args)],
            [4, 1, 1],
            [232, 40, 40],
        )
