"""A prefill in one kernel on Hopper, with a role for each group of warps.

What chunk_prepare.py and chunk_scan.py compute, but the matrices of a chunk never leave the
multiprocessor. A program serves one sequence and value head, in chunks of 64 tokens. Its roles:

    walk      two warp groups (chunk_fused_walk.py), each with 64 rows of the state in its
              registers, which also make the factors of a later chunk's matrices
    invert    a warp group (chunk_fused_inverse.py), which makes the inverse of the next chunk
    load      a warp, which asks for tokens by tensor descriptors, and makes rows of gates

and their barriers, each with who arrives on it:

    full      tokens and gates of a chunk are there (load)
    free      nobody needs them any more (both walks)
    full_u    factors of a chunk are there (both walks)
    full_m    its inverse is there, and what of factors made it may be overwritten (invert)
    free_m    the first walk needs its weights no more, which the second overwrites

A role makes the descriptors that it uses: each takes about 1000 cycles, and others begin meanwhile.
A walk leaves its factors of chunk i + 2 at the end of chunk i, so that ``invert`` has all of chunk
i + 1 for them. Factors and inverses have two slots, tokens and gates three stages.

Bytes of shared memory: tokens 147456, gates 3840, factors 57344 with the weights, inverses 16384,
blocks 2048; with USE_QK_L2NORM 3072 for norms. An output takes the place of its values.

Needs K = V = 128, tokens of bfloat16, rows that fit descriptors, sm_90, and a Triton of ``GLUON``
in chunk_hopper.py. Tensors and flags are those of chunk_prepare.py and chunk_scan.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .chunk_fused_inverse import BT, CUBE, NARROW, ROW, SLOTS, STAGES, TILE, invert
from .chunk_fused_walk import walk_high, walk_low
from .chunk_scan_hopper import load_bounds_of_sequence
from .chunk_scan_walk import group_barrier, plus

# Registers of a thread: of the second walk, of ``invert`` and of ``load``. The first walk has what
# they leave of 512. With 8 less for a walk a prefill takes 3 to 9 % longer (H200, Triton 3.6,
# 2026-11-30), with 8 more ``invert`` has too few for its products to be asynchronous.
REGISTERS = gl.constexpr((200, 88, 24))


@gluon.jit
def load_gates(addresses, i, C: gl.constexpr):
    """g and beta of chunk ``i``: zero past the sequence, and where they are absent 0 and 1."""
    HAS_G: gl.constexpr = C[2]
    HAS_BETA: gl.constexpr = C[3]
    p_g, stride_g_t, p_beta, stride_beta_t, length = addresses[0]
    o_t = gl.arange(0, BT, layout=gl.BlockedLayout([2], [32], [1], [0]))
    m_t = i * BT + o_t < length
    i_first = (i * BT).to(gl.int64)
    b_g, b_beta = gl.where(m_t, 0.0, 0.0), gl.where(m_t, 1.0, 0.0)
    if HAS_G:
        p_g += i_first * stride_g_t
        b_g = gl.load(p_g + o_t * stride_g_t, m_t, 0.0).to(gl.float32)
    if HAS_BETA:
        p_beta += i_first * stride_beta_t
        b_beta = gl.load(p_beta + o_t * stride_beta_t, m_t, 0.0).to(gl.float32)
    return b_g, b_beta


@gluon.jit
def store_gates(gates, b_g, b_beta, i_stage):
    """exp(G), exp(G_last) in each place, G in powers of two, beta, exp(G_last - G) of a chunk."""
    s_decay, s_last, s_G, s_beta, s_tail, _ = gates
    # exp of this is zero in float32. Beyond it, sums would only lose digits, or be NaN.
    b_g = gl.where(b_g < -104.0, -104.0, b_g) * 1.4426950408889634
    b_G = gl.associative_scan(b_g, 0, plus)
    b_sum = gl.sum(b_g, 0)
    s_decay.index(i_stage).store(gl.exp2(b_G))
    s_last.index(i_stage).store(gl.exp2(b_sum + gl.zeros_like(b_G)))
    s_G.index(i_stage).store(b_G)
    s_beta.index(i_stage).store(b_beta)
    s_tail.index(i_stage).store(gl.exp2(b_sum - b_G))


@gluon.jit
def load(tiles, factors, gates, bars, tokens, addresses, chunks, C: gl.constexpr):
    """The role of one warp: tokens and gates of each chunk."""
    s_q, s_k, s_v = tiles
    q, k, v, _, rows = tokens
    full, free, _, _, _ = bars
    i_skip = addresses[3]
    make: gl.constexpr = tma.make_tensor_descriptor
    d_k = make(k[0], [rows, 128], [k[1], 1], [BT, 128], TILE)
    d_q = make(q[0], [rows, 128], [q[1], 1], [BT, 128], TILE)
    d_v = make(v[0], [rows, 128], [v[1], 1], [BT, 64], TILE)
    for i in range(chunks):
        i_stage = i % STAGES
        bar = full.index(i_stage)
        mbarrier.wait(free.index(i_stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, 3 * BT * 128 * 2)
        i_row = (i + i_skip) * BT
        tma.async_copy_global_to_shared(d_k, [i_row, 0], bar, s_k.index(i_stage))
        tma.async_copy_global_to_shared(d_q, [i_row, 0], bar, s_q.index(i_stage))
        for half in gl.static_range(2):
            t_v = s_v.index(2 * i_stage + half)
            tma.async_copy_global_to_shared(d_v, [i_row, half * 64], bar, t_v)
        b_g, b_beta = load_gates(addresses, i, C)
        store_gates(gates, b_g, b_beta, i_stage)
        group_barrier()
        mbarrier.arrive(bar, count=1)


@gluon.jit
def fused_hopper_kernel(
    q,
    k,
    v,
    g,
    beta,
    state,
    final_state,
    state_indices,
    has_initial_state,
    cu_seqlens,
    read_indices,
    o,
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
    stride_g_b,
    stride_g_t,
    stride_g_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
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
    scale: gl.constexpr,
    null_index: gl.constexpr,
    H: gl.constexpr,
    HV: gl.constexpr,
    HAS_G: gl.constexpr,
    HAS_BETA: gl.constexpr,
    HAS_STATE: gl.constexpr,
    HAS_INDICES: gl.constexpr,
    HAS_READ_INDICES: gl.constexpr,
    HAS_INITIAL_STATE: gl.constexpr,
    IS_POOL: gl.constexpr,
    IS_VARLEN: gl.constexpr,
    USE_QK_L2NORM: gl.constexpr,
):
    """One sequence and value head; the grid is ``N * HV``.

    As ``scan_kernel`` of chunk_scan.py, dead rows and padding included.
    """
    i_hv = gl.program_id(0) % HV
    i_n = gl.program_id(0) // HV
    i_h = i_hv // (HV // H)
    # No constant, also of one token.
    length = i_n * 0 + T
    i_b = i_n.to(gl.int64)
    i_first = i_b * 0
    is_live = i_n >= 0
    if IS_VARLEN:
        N = gl.num_programs(0) // HV - 1
        is_live = i_n < N
        i_start, length = load_bounds_of_sequence(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        # Also a tile that is past the end as a whole needs a descriptor that starts within memory.
        i_first = gl.where(length > 0, i_start, 0).to(gl.int64)
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
    # Pointer, strides of V and K, and mask.
    p_final = final_state + i_write * stride_final_state_n + i_hv * stride_final_state_h
    write = (p_final, stride_final_state_v, stride_final_state_k, is_live)
    read = write
    if HAS_STATE:
        m_read = is_live
        if HAS_INITIAL_STATE:
            p_has = has_initial_state + i_row * stride_has_initial_state_n
            m_read = m_read & (gl.load(p_has) != 0)
        p_state = state + i_read * stride_state_n + i_hv * stride_state_h
        read = (p_state, stride_state_v, stride_state_k, m_read)
    p_q = q + i_b * stride_q_b + i_first * stride_q_t + i_h * stride_q_h
    p_k = k + i_b * stride_k_b + i_first * stride_k_t + i_h * stride_k_h
    p_v = v + i_b * stride_v_b + i_first * stride_v_t + i_hv * stride_v_h
    p_o = o + i_b * stride_o_b + i_first * stride_o_t + i_hv * stride_o_h
    # A descriptor ends where the sequence ends: what is past it reads as zero, and is not written.
    rows = gl.maximum(length, 1)
    p_g, p_beta = g, beta
    if HAS_G:
        p_g += i_b * stride_g_b + i_first * stride_g_t + i_hv * stride_g_h
    if HAS_BETA:
        p_beta += i_b * stride_beta_b + i_first * stride_beta_t + i_hv * stride_beta_h

    s_q = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BT, 128], TILE)
    s_k = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BT, 128], TILE)
    s_v = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, BT, 64], TILE)
    s_u = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BT, BT], NARROW)
    s_du = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BT, BT], NARROW)
    s_d = gl.allocate_shared_memory(gl.float32, [SLOTS, 4, 16, 16], CUBE)
    t_zd = gl.allocate_shared_memory(gl.bfloat16, [BT, 16], NARROW)
    s_inverse = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BT, BT], NARROW)
    s_weights = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BT, BT], NARROW)
    s_decay = gl.allocate_shared_memory(gl.float32, [STAGES, BT], ROW)
    s_last = gl.allocate_shared_memory(gl.float32, [STAGES, BT], ROW)
    s_G = gl.allocate_shared_memory(gl.float32, [STAGES, BT], ROW)
    s_beta = gl.allocate_shared_memory(gl.float32, [STAGES, BT], ROW)
    s_tail = gl.allocate_shared_memory(gl.float32, [STAGES, BT], ROW)
    # Of keys inverse norms, squares, inverse norms exp(G); of queries inverse norms.
    s_norms = gl.allocate_shared_memory(gl.float32, [4 * STAGES, BT], ROW)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_u = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    full_m = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free_m = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full_u.index(i), count=2)
        mbarrier.init(full_m.index(i), count=1)
        mbarrier.init(free_m.index(i), count=1)
    fence_async_shared()
    group_barrier()
    # Of an empty sequence a chunk as well, of which nothing is written.
    chunks = gl.cdiv(rows, BT)
    # Where no token is valid all reads are past the end.
    i_skip = gl.where(is_live & (length > 0), 0, chunks)
    i_past = gl.where(length > 0, 0, 1)
    C: gl.constexpr = (scale, HAS_STATE, HAS_G, HAS_BETA, USE_QK_L2NORM)
    args = (
        (s_q, s_k, s_v),
        (s_u, s_du, s_d, t_zd, s_inverse, s_weights),
        (s_decay, s_last, s_G, s_beta, s_tail, s_norms),
        (full, free, full_u, full_m, free_m),
        (
            (p_q, stride_q_t),
            (p_k, stride_k_t),
            (p_v, stride_v_t),
            (p_o, stride_o_t),
            rows,
        ),
        ((p_g, stride_g_t, p_beta, stride_beta_t, length), read, write, i_skip, i_past),
        chunks,
        C,
    )
    gl.warp_specialize(
        [(walk_low, args), (walk_high, args), (invert, args), (load, args)], [4, 4, 1], REGISTERS
    )
