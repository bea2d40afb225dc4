"""The roles of chunk_fused_hopper.py that hold the state, and make the factors of its matrices.

Each has 64 of the rows of the state in its registers, and walks all chunks, of which each has

    x  = v^T - exp(G) (S k^T)                       u  = x inverse^T
    o  = (exp(G) (S q^T) + u weights^T) scale       S' = exp(G_last) S + (u exp(G_last - G)) k

with ``weights`` = D <q, k>, lower. While the state is updated, products of the chunk after next run
for which no state is needed, and what becomes of them is stored when the chunk is done: the first
walk's are keys by keys, for U of chunk_fused_inverse.py, the second's keys by queries: weights.

No more is under way at once: more would take more registers than there are, and ptxas then makes
each product wait for the one before (C7511, C7512 in its log).
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

from .chunk_fused_inverse import BT, DC, DL, DR, SLOTS, STAGES, TILE, row_of_blocks
from .chunk_scan_walk import SA, SC, SL, SR, XA, XC, XL, XR, group_barrier


@gluon.jit
def split_operand(b_x):
    """A float32 operand as a sum of two of bfloat16, which have 16 of its 24 digits."""
    asm: gl.constexpr = """{
        .reg .b32 a, b; cvt.rn.bf16x2.f32 $0, $3, $2; shl.b32 a, $0, 16; and.b32 b, $0, 0xffff0000;
        sub.f32 a, $2, a; sub.f32 b, $3, b; cvt.rn.bf16x2.f32 $1, b, a;
    }"""
    dtypes: gl.constexpr = (gl.bfloat16, gl.bfloat16)
    return gl.inline_asm_elementwise(asm, "=&r,=r,r,r", [b_x], dtypes, is_pure=True, pack=2)


@gluon.jit
def diagonal_blocks(b_x):
    """Of ``[64, 64]`` the blocks of 16, ``[4, 16, 16]``: each thread chooses from what it has."""
    b_even, b_odd = gl.split(gl.reshape(b_x, (4, 16, 2, 2, 16)).permute((0, 1, 4, 2, 3)))
    b_0, b_2 = gl.split(b_even)
    b_1, b_3 = gl.split(b_odd)
    b_0, b_1 = gl.convert_layout(b_0, DL), gl.convert_layout(b_1, DL)
    b_2, b_3 = gl.convert_layout(b_2, DL), gl.convert_layout(b_3, DL)
    i_w = gl.arange(0, 4, layout=gl.SliceLayout(1, DR))[:, None, None]
    return gl.where(i_w == 0, b_0, gl.where(i_w == 1, b_1, gl.where(i_w == 2, b_2, b_3)))


@gluon.jit
def squares_of(b_x):
    """Of products of vectors with each other the squares + 1e-6, ``[4, 16]``."""
    o_r = gl.arange(0, 16, layout=gl.SliceLayout(0, DR))[None, :, None]
    o_c = gl.arange(0, 16, layout=gl.SliceLayout(0, DC))[None, None, :]
    return gl.sum(gl.where(o_r == o_c, diagonal_blocks(b_x), 0.0), 2) + 1e-6


@gluon.jit
def multiply_tokens(tiles, full, i, HALF: gl.constexpr):
    """Products of keys of chunk ``i`` with keys, by the second walk with queries, under way."""
    i_stage = i % STAGES
    mbarrier.wait(full.index(i_stage), (i // STAGES) & 1)
    t_k = tiles[1].index(i_stage)
    t_x = tiles[1 - HALF].index(i_stage)
    b_zero = gl.zeros((BT, BT), gl.float32, XL)
    return warpgroup_mma(t_k, t_x.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def wait_for_products(b_F, tiles, i, USE_QK_L2NORM: gl.constexpr, HALF: gl.constexpr):
    """Those of ``multiply_tokens``, and products whose diagonal are squares of what is normalised.

    Of keys they are the same; those of queries only begin here, where registers are free.
    """
    if HALF == 0 or not USE_QK_L2NORM:
        b_F = warpgroup_mma_wait(0, deps=(b_F,))
        return b_F, b_F
    t_q = tiles[0].index(i % STAGES)
    b_zero = gl.zeros((BT, BT), gl.float32, XL)
    b_N = warpgroup_mma(t_q, t_q.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(b_F, b_N))


@gluon.jit
def store_factors(b_F, b_N, factors, gates, bars, i, zero, C: gl.constexpr, HALF: gl.constexpr):
    """Factors of chunk ``i`` to memory: by the first walk of the inverse, by the second weights."""
    USE_QK_L2NORM: gl.constexpr = C[4]
    i_stage, i_slot = i % STAGES, i % SLOTS
    s_u, s_du, s_d, _, _, s_weights = factors
    s_decay, _, s_G, s_beta, _, s_norms = gates
    _, _, full_u, _, free_m = bars
    o_r = gl.arange(0, BT, layout=XR)[:, None]
    o_c = gl.arange(0, BT, layout=XC)[None, :]
    t_G = s_G.index(i_stage)
    # Where it is no decay, it may be infinite, and is not used.
    b_D = gl.exp2(t_G.load(XC)[None, :] - t_G.load(XR)[:, None])
    if HALF == 0:
        b_U = b_F * -s_beta.index(i_stage).load(XC)[None, :]
        b_U = gl.where(o_c > o_r, b_U * b_D, zero)
        s_d.index(i_slot).store(diagonal_blocks(b_U))
        b_u, b_du = split_operand(b_U)
        s_u.index(i_slot).store(b_u)
        s_du.index(i_slot).store(b_du)
        if USE_QK_L2NORM:
            b_squares = squares_of(b_F)
            b_norm = gl.rsqrt(b_squares)
            t_decay = row_of_blocks(s_decay.index(i_stage))
            row_of_blocks(s_norms.index(4 * i_stage)).store(b_norm)
            row_of_blocks(s_norms.index(4 * i_stage + 1)).store(b_squares)
            row_of_blocks(s_norms.index(4 * i_stage + 2)).store(b_norm * t_decay.load(DR))
    else:
        # The first walk has left the chunk before the one before.
        mbarrier.wait(free_m.index(i_slot), ((i // SLOTS) & 1) ^ 1)
        if USE_QK_L2NORM:
            row_of_blocks(s_norms.index(4 * i_stage + 3)).store(gl.rsqrt(squares_of(b_N)))
        b_P = gl.where(o_c >= o_r, b_F * b_D, zero)
        s_weights.index(i_slot).store(b_P.to(gl.bfloat16))
    fence_async_shared()
    group_barrier()
    mbarrier.arrive(full_u.index(i_slot), count=1)


@gluon.jit
def make_factors(tiles, factors, gates, bars, i, zero, C: gl.constexpr, HALF: gl.constexpr):
    """Factors of chunk ``i``, before the first chunk is walked."""
    b_F = multiply_tokens(tiles, bars[0], i, HALF)
    b_F, b_N = wait_for_products(b_F, tiles, i, C[4], HALF)
    store_factors(b_F, b_N, factors, gates, bars, i, zero, C, HALF)


@gluon.jit
def walk(
    tiles, factors, gates, bars, tokens, addresses, chunks,
    C: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """The role of a warp group: 64 rows of the state, from the first chunk to the last."""
    scale: gl.constexpr = C[0]
    HAS_STATE: gl.constexpr = C[1]
    USE_QK_L2NORM: gl.constexpr = C[4]
    s_q, s_k, s_v = tiles
    _, _, _, _, s_inverse, s_weights = factors
    s_decay, s_last, _, _, s_tail, s_norms = gates
    full, free, _, full_m, free_m = bars
    i_past = addresses[4]
    p_o, stride_o = tokens[3]
    d_o = tma.make_tensor_descriptor(p_o, [tokens[4], 128], [stride_o, 1], [BT, 64], TILE)
    # Of a known zero the compiler would choose after rounding, with halves of registers.
    zero = gl.where(chunks < 0, 1.0, 0.0)
    # A loop is half of the instructions to fetch, 2 % of a prefill of 4 x 2048 tokens; with norms
    # ptxas then orders the walk's so that it takes 5 % longer (H200, Triton 3.6, 2026-11-30).
    if USE_QK_L2NORM:
        make_factors(tiles, factors, gates, bars, 0, zero, C, HALF)
    else:
        for i in range(gl.minimum(chunks, 2)):
            make_factors(tiles, factors, gates, bars, i, zero, C, HALF)
    b_zero = gl.zeros((64, BT), gl.float32, XL)
    b_S = gl.zeros((64, 128), gl.float32, SL)
    if HAS_STATE:
        p_state, stride_v, stride_k, m_read = addresses[1]
        o_v = HALF * 64 + gl.arange(0, 64, layout=SR)
        o_k = gl.arange(0, 128, layout=SC)
        p_state += o_v[:, None] * stride_v + o_k[None, :] * stride_k
        b_S = gl.load(p_state, m_read, 0.0).to(gl.float32)
    if USE_QK_L2NORM and chunks > 1:
        make_factors(tiles, factors, gates, bars, 1, zero, C, HALF)
    for i in range(chunks):
        i_stage, i_slot = i % STAGES, i % SLOTS
        t_k = s_k.index(i_stage)
        # Rows of V; when they are read, the output takes their place.
        t_v = s_v.index(2 * i_stage + HALF)
        t_decay = s_decay.index(i_stage)
        a_S = gl.convert_layout(b_S.to(gl.bfloat16), XA)
        b_x = warpgroup_mma(a_S, t_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        t_q = s_q.index(i_stage)
        b_o = warpgroup_mma(a_S, t_q.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_x, b_o = warpgroup_mma_wait(0, deps=(b_x, b_o))
        mbarrier.wait(full_m.index(i_slot), (i // SLOTS) & 1)
        t_decay_k = s_norms.index(4 * i_stage + 2) if USE_QK_L2NORM else t_decay
        b_decay = t_decay_k.load(XC)
        b_v = t_v.permute((1, 0)).load(XL)
        b_x = b_x * (-b_decay)[None, :] + b_v.to(gl.float32)
        a_x = gl.convert_layout(b_x.to(gl.bfloat16), XA)
        b_u = warpgroup_mma(a_x, s_inverse.index(i_slot), b_zero, use_acc=False, is_async=True)
        b_S = b_S * s_last.index(i_stage).load(SR)[:, None]
        # Read once more, which takes fewer registers.
        b_o = b_o * t_decay.load(XC)[None, :]
        b_u = warpgroup_mma_wait(0, deps=(b_u,))
        a_u = gl.convert_layout(b_u.to(gl.bfloat16), XA)
        b_u = b_u * s_tail.index(i_stage).load(XC)[None, :]
        b_S = warpgroup_mma(gl.convert_layout(b_u.to(gl.bfloat16), SA), t_k, b_S, is_async=True)
        b_o = warpgroup_mma(a_u, s_weights.index(i_slot), b_o, is_async=True)
        # After the last chunks the last one's once more, for nothing.
        i_next = gl.minimum(i + 2, chunks - 1)
        b_F = multiply_tokens(tiles, full, i_next, HALF)
        b_S, b_o = warpgroup_mma_wait(1, deps=(b_S, b_o))
        b_o = b_o * scale
        if USE_QK_L2NORM:
            b_o = b_o * s_norms.index(4 * i_stage + 3).load(XC)[None, :]
        # Every warp has read its values.
        group_barrier()
        t_v.permute((1, 0)).store(b_o.to(gl.bfloat16))
        fence_async_shared()
        group_barrier()
        if HALF == 0:
            mbarrier.arrive(free_m.index(i_slot), count=1)
        tma.async_copy_shared_to_global(d_o, [(i + i_past) * BT, HALF * 64], t_v)
        b_F, b_N = wait_for_products(b_F, tiles, i_next, USE_QK_L2NORM, HALF)
        if i + 2 < chunks:
            store_factors(b_F, b_N, factors, gates, bars, i_next, zero, C, HALF)
        # The output has been read from its stage, and every warp is done with the tokens.
        tma.store_wait(0)
        mbarrier.arrive(free.index(i_stage), count=1)
    p_final, stride_v, stride_k, m_write = addresses[2]
    o_v = HALF * 64 + gl.arange(0, 64, layout=SR)
    o_k = gl.arange(0, 128, layout=SC)
    p_final += o_v[:, None] * stride_v + o_k[None, :] * stride_k
    gl.store(p_final, b_S.to(p_final.dtype.element_ty), m_write)
    tma.store_wait(0)


@gluon.jit
def walk_low(tiles, factors, gates, bars, tokens, addresses, chunks, C: gl.constexpr):
    """The first 64 rows."""
    walk(tiles, factors, gates, bars, tokens, addresses, chunks, C, 0)


@gluon.jit
def walk_high(tiles, factors, gates, bars, tokens, addresses, chunks, C: gl.constexpr):
    """The other 64 rows."""
    walk(tiles, factors, gates, bars, tokens, addresses, chunks, C, 1)
