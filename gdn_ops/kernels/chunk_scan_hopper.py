"""The scan over chunks on Hopper: the maths of chunk_scan.py, with a role for each group of warps.

    x  = v^T - exp(G) (S k^T)
    o  = (exp(G) (S q^T) + x weights^T) scale
    S' = exp(G_last) S + (x inverse^T) k

chunk_scan.py has the legend: tensors, strides, sizes, tiles and flags are the same, in the same
order, so that one launch serves either kernel; here ``done`` of chunk_prepare_beside.py follows
them, with HAS_DONE where chunks are prepared beside this kernel. This one is written in Gluon, in
which layouts, barriers and the order of products are the author's. The roles of a program:

    walk    a warp group for each 64 of the ``BV`` rows of the state, which stay in its registers
            (chunk_scan_walk.py)
    load    one warp, which asks for the tiles of the next chunks by tensor descriptors, as soon as
            every group has left the chunk whose memory they take

A role makes the descriptors that it uses: each takes about 1000 cycles, and others begin meanwhile.
A launch with ``launch_pdl`` begins when all programs of the kernel before have begun, and reads
nothing of theirs before they are done, or with HAS_DONE before the chunk is. Then it waits for them
at the end: until then they use ``done``, whose memory is free for others when this kernel is over.

Shared memory has STAGES = 3 chunks, each with a barrier ``full``, on which the bytes of its tiles
arrive, and one ``free``, on which each group arrives a chunk later: every warp has then passed a
barrier of its group, and needs none for this. Bytes, with ``BV`` 64 and 128:

    q, k               2 x 3 x 16384        98304     98304
    v                      3 x  128 BV      24576     49152
    inverse, weights   2 x 3 x  8192        49152     49152
    o                           128 BV       8192     16384
    decays                 3 x  256 ROWS     2304      2304    with USE_QK_L2NORM; else 1536

A thread of a walk has 240 registers. Needs K = V = 128, chunks of 64 tokens of 16 bits, descriptors
for tokens and output, sm_90, and a Triton of ``GLUON`` in chunk_hopper.py, which has its times.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .chunk_forget_hopper import all_forget, find_chunk, find_forgotten, find_segment
from .chunk_prepare import load_bounds
from .chunk_prepare_beside import ITEMS
from .chunk_scan_walk import (
    group_barrier,
    tile_layout,
    wait_for_chunk,
    wait_for_kernel_before,
    walk_high,
    walk_low,
)

# The same function, for a kernel of Gluon.
load_bounds_of_sequence = gluon.jit(load_bounds.fn)


@gluon.constexpr_function
def row_layout(rank):
    """Of a row of decays, as descriptors write it."""
    if rank == 1:
        return gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@gluon.jit
def load_chunks(tiles, bars, sources, read, write, i_v, i_skip, chunks, C: gl.constexpr):
    """The role of one warp: tiles of tokens, and the matrices and decays of their chunks."""
    BT: gl.constexpr = C[0]
    STAGES: gl.constexpr = C[1]
    HALVES: gl.constexpr = C[2]
    ROWS: gl.constexpr = C[3]
    HV: gl.constexpr = C[7]
    s_q, s_k, s_v, s_inverse, s_weights, s_decays, _ = tiles
    HAS_DONE: gl.constexpr = C[8]
    H: gl.constexpr = C[9]
    q, k, v, o, p_inverse, p_weights, p_decays, places, done, p_done = sources
    rows = o[2] + o[3] * BT
    full, free = bars
    BYTES: gl.constexpr = 2 * BT * (2 * 128 + HALVES * 64 + 2 * BT) + ROWS * BT * 4
    TILE: gl.constexpr = tile_layout()
    ROW: gl.constexpr = row_layout(2)
    make: gl.constexpr = tma.make_tensor_descriptor
    d_k = make(k[0], [rows, 128], [k[1], 1], [BT, 128], TILE)
    d_q = make(q[0], [rows, 128], [q[1], 1], [BT, 128], TILE)
    d_v = make(v[0], [rows, 128], [v[1], 1], [BT, 64], TILE)
    d_inverse = make(p_inverse, [rows, BT], [HV * BT, 1], [BT, BT], TILE)
    d_weights = make(p_weights, [rows, BT], [HV * BT, 1], [BT, BT], TILE)
    d_decays = make(p_decays, [places, ROWS * BT], [HV * ROWS * BT, 1], [1, BT], ROW)
    waits = 1
    if HAS_DONE:
        waits = gl.load(done + 1)
    if waits != 0:
        wait_for_kernel_before()
    for i in range(chunks):
        i_stage = i % STAGES
        mbarrier.wait(free.index(i_stage), ((i // STAGES) & 1) ^ 1)
        bar = full.index(i_stage)
        mbarrier.expect(bar, BYTES)
        if HAS_DONE:  # noqa: SIM102 what is no constant must not decide whether this is compiled
            if waits == 0:
                wait_for_chunk(p_done + i * H)
        i_row = (i + i_skip) * BT
        tma.async_copy_global_to_shared(d_k, [i_row, 0], bar, s_k.index(i_stage))
        tma.async_copy_global_to_shared(d_q, [i_row, 0], bar, s_q.index(i_stage))
        for row in gl.static_range(ROWS):
            b_row = s_decays.index(ROWS * i_stage + row)
            b_row = b_row._reinterpret(gl.float32, [1, BT], row_layout(2))
            tma.async_copy_global_to_shared(d_decays, [i + i_skip, row * BT], bar, b_row)
        for half in gl.static_range(HALVES):
            o_v = (i_v * HALVES + half) * 64
            b_v = s_v.index(HALVES * i_stage + half)
            tma.async_copy_global_to_shared(d_v, [i_row, o_v], bar, b_v)
        tma.async_copy_global_to_shared(d_inverse, [i_row, 0], bar, s_inverse.index(i_stage))
        tma.async_copy_global_to_shared(d_weights, [i_row, 0], bar, s_weights.index(i_stage))
    if HAS_DONE:
        wait_for_kernel_before()


@gluon.jit
def scan_hopper_kernel(
    q,
    k,
    v,
    inverse,
    weights,
    decays,
    kept,
    state,
    segment_states,
    final_state,
    state_indices,
    has_initial_state,
    cu_seqlens,
    read_indices,
    o,
    done,
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
    stride_state_n,
    stride_state_h,
    stride_state_v,
    stride_state_k,
    stride_final_state_n,
    stride_final_state_h,
    stride_final_state_v,
    stride_final_state_k,
    stride_state_indices_n,
    stride_has_initial_state_n,
    stride_cu_seqlens_n,
    stride_read_indices_n,
    stride_o_b,
    stride_o_t,
    stride_o_h,
    stride_o_v,
    T,
    B,
    scale: gl.constexpr,
    null_index: gl.constexpr,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    HAS_STATE: gl.constexpr,
    HAS_INDICES: gl.constexpr,
    HAS_READ_INDICES: gl.constexpr,
    HAS_INITIAL_STATE: gl.constexpr,
    IS_POOL: gl.constexpr,
    IS_VARLEN: gl.constexpr,
    HAS_KEPT: gl.constexpr,
    HAS_SEGMENT_STATES: gl.constexpr,
    HAS_DONE: gl.constexpr,
    USE_QK_L2NORM: gl.constexpr,
    USE_DESCRIPTORS: gl.constexpr,
    USE_DESCRIPTOR_STORE: gl.constexpr,
    STORES_FIRST: gl.constexpr,
    INDEX: gl.constexpr,
    DOT: gl.constexpr,
    PRECISION: gl.constexpr,
    SEGMENTS: gl.constexpr,
    LEAST: gl.constexpr,
    FORGOTTEN: gl.constexpr,
    LOOK: gl.constexpr,
    BT: gl.constexpr,
    BK: gl.constexpr,
    BV: gl.constexpr,
    BN: gl.constexpr,
):
    """One sequence or segment, value head and tile of V; the grid is ``N * HV * cdiv(V, BV)``.

    As ``scan_kernel`` of chunk_scan.py, dead rows and padding included.
    """
    gl.static_assert(K == 128 and V == 128 and BK == 128 and BT == 64)
    gl.static_assert(BV == 64 or BV == 128)
    gl.static_assert(USE_DESCRIPTORS and USE_DESCRIPTOR_STORE)
    NV: gl.constexpr = V // BV
    i_v = gl.program_id(0) % NV
    i_hv = gl.program_id(0) // NV % HV
    i_n = gl.program_id(0) // (NV * HV)
    i_h = i_hv // (HV // H)
    # No constant, also of one token.
    length = i_n * 0 + T
    if SEGMENTS > 1:
        i_s = i_n.to(gl.int64)
        chunks, i_n, i_segment = find_segment(i_n, length, B, BT, SEGMENTS, LEAST)
    i_b = i_n.to(gl.int64)
    i_first = i_b * 0
    is_live = i_n >= 0
    if IS_VARLEN:
        N = gl.num_programs(0) // (NV * HV) - 1
        if SEGMENTS > 1:
            N = N - gl.cdiv(T, chunks * BT)
            place = i_s.to(gl.int32)
            i_n, i_segment = find_chunk(
                cu_seqlens, place, stride_cu_seqlens_n, N + 1, chunks * BT, BN
            )
        is_live = i_n < N
        i_start, length = load_bounds_of_sequence(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        i_first = i_start.to(gl.int64)
        i_b = i_b * 0

    i_write = i_n.to(gl.int64)
    i_read = i_write
    i_row = gl.where(is_live, i_n, 0)
    if IS_POOL:
        if HAS_INDICES:
            i_write = gl.load(state_indices + i_row * stride_state_indices_n).to(gl.int64)
            i_read = i_write
        if HAS_READ_INDICES:
            i_read = gl.load(read_indices + i_row * stride_read_indices_n).to(gl.int64)
        is_live = is_live & (i_read > null_index) & (i_write > null_index) & (length > 0)

    i_place = i_b * gl.cdiv(T, BT)
    if IS_VARLEN:
        i_place = i_first // BT + i_n
    is_last = is_live
    # Chunks that are walked before the segment's own.
    i_own = 0
    if SEGMENTS > 1:
        i_chunk = i_segment * chunks
        rest = length - i_chunk * BT
        is_last = is_live & (rest <= chunks * BT)
        length = gl.minimum(rest, chunks * BT)
        if IS_VARLEN:
            # Places that are left over have no tokens, and are not the last.
            is_last = is_last & ((rest > 0) | (i_segment == 0))
            i_chunk = gl.where(rest > 0, i_chunk, 0)
            length = gl.maximum(length, 0)
        if HAS_KEPT:
            is_early = all_forget(kept, T, B, chunks, HV, BT, FORGOTTEN, LOOK, BN)
            i_begin = find_forgotten(kept + i_place * HV + i_hv, i_chunk, HV, FORGOTTEN, LOOK)
            i_own = gl.where(is_early, i_chunk - i_begin, 0)
            length += i_own * BT
            i_chunk -= i_own
            is_first = i_chunk == 0
            if not HAS_SEGMENT_STATES:
                # One program walks all, or each its own.
                is_whole = (i_segment == 0) & (is_early == 0)
                is_last = is_live & (is_last & is_early | is_whole)
                length = gl.where(is_early, length, gl.where(is_whole, T, 0))
                i_chunk = gl.where(is_early, i_chunk, 0)
        i_first += i_chunk * BT
        i_place += i_chunk

    # Pointer, strides of V and K, and mask.
    p_final = final_state + i_write * stride_final_state_n + i_hv * stride_final_state_h
    read = (p_final, stride_final_state_v, stride_final_state_k, is_live)
    if HAS_SEGMENT_STATES:
        m_read = is_live
        if HAS_KEPT:
            i_s = gl.where(is_early, i_s - i_segment, i_s)
            m_read = m_read & (is_first | (is_early == 0))
        read = (segment_states + (i_s * HV + i_hv) * (V * K), K, 1, m_read)
    elif HAS_STATE:
        m_read = is_live
        if HAS_KEPT:
            m_read = m_read & is_first
        if HAS_INITIAL_STATE:
            p_has = has_initial_state + i_row * stride_has_initial_state_n
            m_read = m_read & (gl.load(p_has) != 0)
        p_state = state + i_read * stride_state_n + i_hv * stride_state_h
        read = (p_state, stride_state_v, stride_state_k, m_read)
    write = (p_final, stride_final_state_v, stride_final_state_k, is_last)

    p_q = q + i_b * stride_q_b + i_first * stride_q_t + i_h * stride_q_h
    p_k = k + i_b * stride_k_b + i_first * stride_k_t + i_h * stride_k_h
    p_v = v + i_b * stride_v_b + i_first * stride_v_t + i_hv * stride_v_h
    p_o = o + i_b * stride_o_b + (i_first + i_own * BT) * stride_o_t + i_hv * stride_o_h
    o_block = ((i_b * T + i_first) * HV + i_hv) * BT
    ROWS: gl.constexpr = 3 if USE_QK_L2NORM else 2
    p_decays = decays + (i_place * HV + i_hv) * (ROWS * BT)
    p_done = decays
    if HAS_DONE:
        p_done = done + ITEMS + i_place * H + i_h
    # A descriptor ends where the sequence ends: what is past it reads as zero, and is not written.
    rows = gl.maximum(length, 1)
    places = gl.cdiv(rows, BT)
    TILE: gl.constexpr = tile_layout()
    STAGES: gl.constexpr = 3
    HALVES: gl.constexpr = BV // 64
    s_q = gl.allocate_shared_memory(DOT, [STAGES, BT, K], TILE)
    s_k = gl.allocate_shared_memory(DOT, [STAGES, BT, K], TILE)
    s_v = gl.allocate_shared_memory(DOT, [STAGES * HALVES, BT, 64], TILE)
    s_inverse = gl.allocate_shared_memory(DOT, [STAGES, BT, BT], TILE)
    s_weights = gl.allocate_shared_memory(DOT, [STAGES, BT, BT], TILE)
    s_o = gl.allocate_shared_memory(DOT, [HALVES, BT, 64], TILE)
    s_decays = gl.allocate_shared_memory(gl.float32, [STAGES * ROWS, BT], row_layout(1))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=HALVES)
    fence_async_shared()
    group_barrier()
    READS: gl.constexpr = HAS_SEGMENT_STATES or HAS_STATE
    # Of segments, from the kernel before; beside one that prepares there are none.
    READS_STATES: gl.constexpr = SEGMENTS > 1 and not HAS_DONE
    C: gl.constexpr = (BT, STAGES, HALVES, ROWS, scale, READS, READS_STATES, HV, HAS_DONE, H)
    # Where no token is valid all reads are past the end.
    i_skip = gl.where(is_live, 0, places)
    args = (
        (s_q, s_k, s_v, s_inverse, s_weights, s_decays, s_o),
        (full, free),
        (
            (p_q, stride_q_t),
            (p_k, stride_k_t),
            (p_v, stride_v_t),
            (p_o, stride_o_t, rows - i_own * BT, i_own),
            inverse + o_block,
            weights + o_block,
            p_decays,
            places,
            done,
            p_done,
        ),
        read,
        write,
        i_v,
        i_skip,
        gl.cdiv(length, BT),
        C,
    )
    if HALVES == 1:
        gl.warp_specialize([(walk_low, args), (load_chunks, args)], [1], [24])
    else:
        gl.warp_specialize(
            [(walk_low, args), (walk_high, args), (load_chunks, args)], [4, 1], [240, 24]
        )
