"""What segments do to states on Hopper: the maths of chunk_carry.py, with roles for warps.

    x  = v^T - exp(G) (S k^T)                    of M without v^T
    S' = exp(G_last) S + (x inverse^T) k

Tensors, strides, sizes, tiles and flags are those of chunk_carry.py, in the same order, so that one
launch serves either kernel. The roles of a program, which has all rows of C, or all of M:

    walk    two warp groups, with 64 of the 128 rows each
    load    a warp: tiles of the next chunks, by tensor descriptors

A launch with ``launch_pdl`` begins when all programs of ``prepare_kernel`` have begun, and reads
nothing of theirs before they are done.

Shared memory has STAGES = 3 chunks, each with a barrier ``full``, on which the bytes of its tiles
arrive, and one ``free``, on which each group arrives a chunk later. Bytes: k and v 49152 each,
inverse 24576, decays 2304 with USE_QK_L2NORM, else 1536. Needs K = V = BV = 128, chunks of 64
tokens of 16 bits, descriptors, sm_90, and a Triton of ``GLUON`` in chunk_hopper.py.
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

from .chunk_forget_hopper import all_forget, find_chunk, find_forgotten, find_segment
from .chunk_scan_hopper import load_bounds_of_sequence, row_layout
from .chunk_scan_walk import (
    SA,
    SC,
    SR,
    XA,
    XC,
    XL,
    group_barrier,
    tile_layout,
    wait_for_kernel_before,
)


@gluon.jit
def load_chunks(tiles, bars, sources, sizes, carry, C: gl.constexpr):
    """The role of a warp: keys, values, inverses and decays of the chunks."""
    BT: gl.constexpr = C[0]
    STAGES: gl.constexpr = C[1]
    ROWS: gl.constexpr = C[2]
    HV: gl.constexpr = C[3]
    s_k, s_v, s_inverse, s_decays = tiles
    full, free = bars
    k, v, p_inverse, p_decays = sources
    chunks, is_value, _ = sizes
    rows = gl.maximum(chunks, 1) * BT
    TILE: gl.constexpr = tile_layout()
    make: gl.constexpr = tma.make_tensor_descriptor
    d_k = make(k[0], [rows, 128], [k[1], 1], [BT, 128], TILE)
    d_v = make(v[0], [rows, 128], [v[1], 1], [BT, 64], TILE)
    d_inverse = make(p_inverse, [rows, BT], [HV * BT, 1], [BT, BT], TILE)
    d_decays = make(
        *(p_decays, [rows // BT, ROWS * BT], [HV * ROWS * BT, 1], [1, BT], row_layout(2))
    )
    wait_for_kernel_before()
    for i in range(chunks):
        i_stage = i % STAGES
        mbarrier.wait(free.index(i_stage), ((i // STAGES) & 1) ^ 1)
        bar = full.index(i_stage)
        mbarrier.expect(bar, 2 * BT * (128 + 128 + BT) + ROWS * BT * 4)
        tma.async_copy_global_to_shared(d_k, [i * BT, 0], bar, s_k.index(i_stage))
        for row in gl.static_range(ROWS):
            b_row = s_decays.index(ROWS * i_stage + row)
            b_row = b_row._reinterpret(gl.float32, [1, BT], row_layout(2))
            tma.async_copy_global_to_shared(d_decays, [i, row * BT], bar, b_row)
        # A row of M has no values: past the end they are zero.
        i_row = gl.where(is_value, i, chunks) * BT
        for half in gl.static_range(2):
            b_v = s_v.index(2 * i_stage + half)
            tma.async_copy_global_to_shared(d_v, [i_row, half * 64], bar, b_v)
        tma.async_copy_global_to_shared(d_inverse, [i * BT, 0], bar, s_inverse.index(i_stage))


@gluon.jit
def walk_chunks(tiles, bars, sources, sizes, carry, C: gl.constexpr, HALF: gl.constexpr):
    """The role of a warp group: 64 rows of C or M, from the first chunk to the last."""
    BT: gl.constexpr = C[0]
    STAGES: gl.constexpr = C[1]
    ROWS: gl.constexpr = C[2]
    s_k, s_v, s_inverse, s_decays = tiles
    full, free = bars
    chunks, _, is_identity = sizes
    DOT: gl.constexpr = s_k.dtype
    b_zero = gl.zeros((64, BT), gl.float32, XL)
    o_v = HALF * 64 + gl.arange(0, 64, layout=SR)
    o_k = gl.arange(0, 128, layout=SC)
    b_S = gl.where((o_v[:, None] == o_k[None, :]) & is_identity, 1.0, 0.0)
    for i in range(chunks):
        i_stage = i % STAGES
        mbarrier.wait(full.index(i_stage), (i // STAGES) & 1)
        b_k = s_k.index(i_stage)
        t_decay = s_decays.index(ROWS * i_stage)
        t_last = s_decays.index(ROWS * i_stage + ROWS - 1)
        b_Sd = gl.convert_layout(b_S.to(DOT), XA)
        b_x = warpgroup_mma(b_Sd, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        # Every warp has left the chunk before.
        group_barrier()
        mbarrier.arrive(free.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
        b_decay = -t_decay.load(XC)
        if ROWS == 3:
            b_decay = b_decay * s_decays.index(ROWS * i_stage + 1).load(XC)
        b_v = s_v.index(2 * i_stage + HALF).permute((1, 0)).load(XL)
        b_x = warpgroup_mma_wait(0, deps=(b_x,))
        b_x = b_x * b_decay[None, :] + b_v.to(gl.float32)
        b_xd = gl.convert_layout(b_x.to(DOT), XA)
        b_inverse = s_inverse.index(i_stage).permute((1, 0))
        b_u = warpgroup_mma(b_xd, b_inverse, b_zero, use_acc=False, is_async=True)
        b_S = b_S * t_last.load(SR)[:, None]
        b_u = warpgroup_mma_wait(0, deps=(b_u,))
        b_ud = gl.convert_layout(b_u.to(DOT), SA)
        b_S = warpgroup_mma(b_ud, b_k, b_S, is_async=True)
        b_S = warpgroup_mma_wait(0, deps=(b_S,))
    p_carry, stride_r, stride_k, m_carry = carry
    gl.store(p_carry + o_v[:, None] * stride_r + o_k[None, :] * stride_k, b_S, m_carry)


@gluon.jit
def walk_low(tiles, bars, sources, sizes, carry, C: gl.constexpr):
    """The first 64 rows."""
    walk_chunks(tiles, bars, sources, sizes, carry, C, 0)


@gluon.jit
def walk_high(tiles, bars, sources, sizes, carry, C: gl.constexpr):
    """The other 64 rows."""
    walk_chunks(tiles, bars, sources, sizes, carry, C, 1)


@gluon.jit
def carry_hopper_kernel(
    k,
    v,
    inverse,
    decays,
    kept,
    cu_seqlens,
    carry,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_k_k,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_v_v,
    stride_cu_seqlens_n,
    stride_carry_b,
    stride_carry_s,
    stride_carry_h,
    stride_carry_r,
    stride_carry_k,
    T,
    B,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    IS_VARLEN: gl.constexpr,
    HAS_KEPT: gl.constexpr,
    USE_QK_L2NORM: gl.constexpr,
    USE_DESCRIPTORS: gl.constexpr,
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
    """C or M of one segment and value head; the grid is ``places * HV * 2``."""
    gl.static_assert(K == 128 and V == 128 and BV == 128 and BT == 64)
    gl.static_assert(USE_DESCRIPTORS and HAS_KEPT)
    is_value = gl.program_id(0) % 2 == 0
    i_hv = gl.program_id(0) // 2 % HV
    i_s = gl.program_id(0) // (2 * HV)
    i_h = i_hv // (HV // H)
    i_place, i_row, i_batch = i_s, i_s, i_s * 0
    chunks, i_n, i_segment = find_segment(i_s, T, B, BT, SEGMENTS, LEAST)
    length = i_s * 0 + T
    if IS_VARLEN:
        N = gl.num_programs(0) // (2 * HV) - gl.cdiv(T, chunks * BT)
        i_n, i_segment = find_chunk(cu_seqlens, i_s, stride_cu_seqlens_n, N, chunks * BT, BN)
        i_start, length = load_bounds_of_sequence(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        i_first = i_start.to(gl.int64)
        i_place = i_first // BT + i_n
        i_b = i_first * 0
    else:
        are_early = all_forget(kept, T, B, chunks, HV, BT, FORGOTTEN, LOOK, BN)
        length = gl.where(are_early, 0, length)
        i_b = i_n.to(gl.int64)
        i_first = i_b * 0
        i_place = i_b * gl.cdiv(T, BT)
        i_row, i_batch = i_segment, i_n
    # The last segment, and places left over, hand nothing on.
    is_handed = (i_segment + 1) * chunks * BT < length
    i_skip = gl.where(is_handed, i_segment * chunks, 0)
    i_place += i_skip
    walked = gl.where(is_handed, chunks, 0)
    i_begin = find_forgotten(kept + i_place * HV + i_hv, walked, HV, FORGOTTEN, LOOK)
    is_forgotten = i_begin > 0
    # Of the identity nothing is left.
    i_begin = gl.where(is_forgotten & (is_value == 0), walked, i_begin)
    walked -= i_begin
    # Of no chunk there may be no memory, which no descriptor may name.
    i_begin = gl.where(walked > 0, i_begin, 0)
    i_first += (i_skip + i_begin) * BT
    i_place += i_begin

    ROWS: gl.constexpr = 3 if USE_QK_L2NORM else 2
    STAGES: gl.constexpr = 3
    TILE: gl.constexpr = tile_layout()
    p_k = k + i_b * stride_k_b + i_first * stride_k_t + i_h * stride_k_h
    p_v = v + i_b * stride_v_b + i_first * stride_v_t + i_hv * stride_v_h
    p_inverse = inverse + ((i_b * T + i_first) * HV + i_hv) * BT
    p_decays = decays + (i_place * HV + i_hv) * (ROWS * BT)
    p_carry = carry + i_batch.to(gl.int64) * stride_carry_b + i_row.to(gl.int64) * stride_carry_s
    p_carry += i_hv * stride_carry_h + gl.where(is_value, 0, V) * stride_carry_r
    s_k = gl.allocate_shared_memory(DOT, [STAGES, BT, K], TILE)
    s_v = gl.allocate_shared_memory(DOT, [STAGES * 2, BT, 64], TILE)
    s_inverse = gl.allocate_shared_memory(DOT, [STAGES, BT, BT], TILE)
    s_decays = gl.allocate_shared_memory(gl.float32, [STAGES * ROWS, BT], row_layout(1))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    group_barrier()
    C: gl.constexpr = (BT, STAGES, ROWS, HV)
    args = (
        (s_k, s_v, s_inverse, s_decays),
        (full, free),
        ((p_k, stride_k_t), (p_v, stride_v_t), p_inverse, p_decays),
        (walked, is_value, (is_value == 0) & (is_forgotten == 0)),
        (p_carry, stride_carry_r, stride_carry_k, is_handed),
        C,
    )
    gl.warp_specialize(
        [(walk_low, args), (walk_high, args), (load_chunks, args)], [4, 1], [240, 24]
    )
