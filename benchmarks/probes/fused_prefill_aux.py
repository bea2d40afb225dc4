"""The auxiliary warp group of fused_prefill.py: the two matrices of each chunk, in shared memory.

With P_ij = D_ij <q_i, k_j>, the strictly upper U_ij = -beta_j D_ji <k_i, k_j> for j > i, and the
transpose of X, Z = X^T = (I - U)^-1, it makes

    inverse^T = diag(beta) Z diag(exp(G_last - G))         weights^T = diag(beta) Z P^T

It works on transposes so that the right operand of each product is in memory before the left, which
stays in registers. Of a chunk, in this order:

1. ``multiply_tokens``: keys by keys and queries in one product (wgmma); ``decay_products``: times
   decays. P^T goes to memory.
2. ``store_factors``: diagonal blocks of 16 x 16, one in each warp, are inverted by mma.sync without
   leaving registers: blocks of 2, merged thrice. U - I goes to memory as a sum of two bfloat16.
3. ``substitute``: substitution by block columns, Z_c = (E_c + sum of Z_j U_jc for j < c) Z_cc, by
   mma.sync. Warp w has rows 16 w to 16 w + 15 of all of them, so no left operand leaves its warp.
4. ``refine``: a step of Newton's with both parts of U - I takes back what rounding to bfloat16 lost
   in 2 and 3 (wgmma).
5. ``aux``: outputs, from Z and its product with P^T (wgmma). 1 begins for the chunk after, then
   they are published.

``a_`` is a block ``b_`` as a left operand, ``t_`` a tile of shared memory, ``s_`` stages of one.
``tokens mats gates scratch bars place`` are tuples that ``fused_kernel`` makes.
"""

# ruff: noqa: TID253 -- imported by a script only
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared as fence
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma as wgmma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait as wgmma_wait

# Tokens of a chunk; stages of tokens and gates, and of matrices.
BT, NST, NM = gl.constexpr(64), gl.constexpr(3), gl.constexpr(2)
# Sums of wgmma, 64 x 128 and 64 x 64, and of mma.sync, blocks of 16 and block columns 64 x 16.
# Then their left operands (A), right operands (B), rows (R) and columns (C).
SL, XL = (gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16])) for n in (128, 64))
DL = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))
CL = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
SA, XA, DA, CA = (gl.constexpr(gl.DotOperandLayout(0, x, 2)) for x in (SL, XL, DL, CL))
DB, CB = (gl.constexpr(gl.DotOperandLayout(1, x, 2)) for x in (DL, CL))
SR, SC, XR, XC = (gl.constexpr(gl.SliceLayout(n, x)) for x in (SL, XL) for n in (1, 0))
DR, DC = (gl.constexpr(gl.SliceLayout(n, DL)) for n in (2, 1))
# Tokens as descriptors see them and as products do; matrices, whose blocks of 16 columns lie apart,
# so that one can be read alone; gates.
LOADED, TOKENS = (gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=n)) for n in (3, 2))
NARROW = gl.constexpr(gl.NVMMASharedLayout(32, 16, rank=2))
ROW, ROWS = (gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, x)) for x in ([0], [1, 0]))


@gluon.jit
def load_gates(p_g, p_beta, o_g, i, T, HV: gl.constexpr):
    """``g`` and ``beta`` of chunk ``i``, in each warp; zero past the sequence."""
    o_t = gl.arange(0, 64, layout=gl.BlockedLayout([2], [32], [4], [0])) + i * 64
    b_g = gl.load(p_g + o_g + o_t * HV, o_t < T, 0.0)
    return b_g, gl.load(p_beta + o_g + o_t * HV, o_t < T, 0.0)


@gluon.jit
def plus(a, b):
    return a + b


@gluon.jit
def store_gates(gates, b_g, b_beta, st):
    """exp(G), exp(G_last) in each place, G in powers of two, beta, exp(G_last - G)."""
    # exp of this is zero in float32. Beyond it, sums would only lose digits, or be NaN.
    b_g = gl.where(b_g < -104.0, -104.0, b_g) * 1.4426950408889634
    b_G = gl.associative_scan(b_g, 0, plus)
    b_sum = gl.sum(b_g, 0)
    gates[0].index(st).store(gl.exp2(b_G))
    gates[1].index(st).store(gl.exp2(b_sum + gl.zeros_like(b_G)))
    gates[2].index(st).store(b_G)
    gates[3].index(st).store(b_beta)
    gates[4].index(st).store(gl.exp2(b_sum - b_G))


@gluon.jit
def multiply_tokens(s_kq, full, i):
    """Products of keys of chunk ``i`` with keys and queries, under way."""
    mbarrier.wait(full.index(i % NST), (i // NST) & 1)
    t_kq = s_kq.index(i % NST)
    # Keys are the left operand of both, read once.
    b_zero = gl.zeros((BT, 2 * BT), gl.float32, SL)
    return wgmma(t_kq.slice(0, BT), t_kq.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def decay_products(b_KKQ, t_p, s_G, i, zero):
    """The products of chunk ``i`` times decays; those with queries go to memory as P^T."""
    t_G = s_G.index(i % NST)
    o_r, o_c = gl.arange(0, BT, layout=XR)[:, None], gl.arange(0, BT, layout=XC)[None, :]
    # Of the two decays between a pair of tokens the one that is not above 1: symmetric.
    b_D = gl.exp2(-gl.abs(t_G.load(XC)[None, :] - t_G.load(XR)[:, None]))
    b_KKQ = wgmma_wait(0, deps=(b_KKQ,))
    b_KK, b_KQ = gl.split(gl.reshape(b_KKQ, (BT, 2, BT)).permute((0, 2, 1)))
    b_KQ = gl.convert_layout(b_KQ, XL) * b_D
    t_p.store(gl.where(o_c >= o_r, b_KQ, zero).to(gl.bfloat16))
    return gl.convert_layout(b_KK, XL) * b_D


@gluon.jit
def as_right(b_x):
    """The transpose of each of ``[4, 16, 16]`` as a right operand: no number leaves its thread."""
    return gl.convert_layout(b_x.to(gl.bfloat16).permute((0, 2, 1)), DB, assert_trivial=False)


@gluon.jit
def select_blocks(b_x, o_r, o_c, zero, n: gl.constexpr):
    """Of each ``[16, 16]`` the quarters off the diagonal in diagonal blocks of 2 n."""
    return gl.where((o_r // (2 * n) == o_c // (2 * n)) & (o_r // n != o_c // n), b_x, zero)


@gluon.jit
def invert_diagonal(b_U, b_L, o_r, o_c, zero):
    """``(I - U)^-1`` of strictly upper ``[4, 16, 16]``; ``b_L`` is ``U^T``.

    Blocks of 2, then merges ``Z + Z U' Z`` with U' the quarters beside the diagonal. The transpose
    is merged beside it: the transpose of what a thread has is what it needs as a right operand.
    """
    b_zero = gl.zeros((4, 16, 16), gl.float32, DL)
    b_Z = gl.where(o_r == o_c, 1.0, gl.where(o_r // 2 == o_c // 2, b_U, zero))
    b_X = gl.where(o_r == o_c, 1.0, gl.where(o_r // 2 == o_c // 2, b_L, zero))
    for i in gl.static_range(1, 4):
        b_z, b_x = b_Z.to(gl.bfloat16), b_X.to(gl.bfloat16)
        b_u = as_right(select_blocks(b_L, o_r, o_c, zero, 2**i))
        b_l = as_right(select_blocks(b_U, o_r, o_c, zero, 2**i))
        b_Y = mma_v2(gl.convert_layout(b_z, DA), b_u, b_zero)
        b_Z = mma_v2(gl.convert_layout(b_Y.to(gl.bfloat16), DA), as_right(b_x), b_Z)
        if i < 3:
            b_Y = mma_v2(gl.convert_layout(b_x, DA), b_l, b_zero)
            b_X = mma_v2(gl.convert_layout(b_Y.to(gl.bfloat16), DA), as_right(b_z), b_X)
    return b_Z


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
def split_operand(b_x):
    """A float32 operand as a sum of two of bfloat16, which have 16 of its 24 digits."""
    asm: gl.constexpr = """{
        .reg .b32 a, b; cvt.rn.bf16x2.f32 $0, $3, $2; shl.b32 a, $0, 16; and.b32 b, $0, 0xffff0000;
        sub.f32 a, $2, a; sub.f32 b, $3, b; cvt.rn.bf16x2.f32 $1, b, a;
    }"""
    dtypes: gl.constexpr = (gl.bfloat16, gl.bfloat16)
    return gl.inline_asm_elementwise(asm, "=&r,=r,r,r", [b_x], dtypes, is_pure=True, pack=2)


@gluon.jit
def store_factors(b_KK, t_beta, t_u, t_du, t_zd, offsets, zero):
    """U - I and the inverses of the diagonal blocks of I - U to memory; returns the inverses."""
    o_r, o_c, o_dr, o_dc, _ = offsets
    b_d = diagonal_blocks(b_KK)
    t_beta4 = t_beta._reinterpret(gl.float32, [4, 16], ROWS)
    b_dU = -t_beta4.load(DC)[:, None, :] * b_d
    b_dU = gl.where(o_dc > o_dr, b_dU, 0.0)
    b_dL = -t_beta4.load(DR)[:, :, None] * b_d
    b_dL = gl.where(o_dc < o_dr, b_dL, 0.0)
    b_zd = invert_diagonal(b_dU, b_dL, o_dr, o_dc, zero)
    b_zd = gl.convert_layout(gl.reshape(b_zd, (BT, 16)), CL)
    t_zd.store(b_zd.to(gl.bfloat16))
    b_dU = gl.where(o_dc == o_dr, -1.0, b_dU)
    b_dU = gl.reshape(b_dU, (BT, 1, 16)).broadcast_to((BT, BT // 16, 16))
    b_dU = gl.convert_layout(gl.reshape(b_dU, (BT, BT)), XL)
    b_U = gl.where(o_c // 16 > o_r // 16, b_KK * (-t_beta.load(XC))[None, :], zero)
    b_u, b_du = split_operand(gl.where(o_c // 16 == o_r // 16, b_dU, b_U))
    t_u.store(b_u)
    t_du.store(b_du)
    return b_zd


@gluon.jit
def substitute(b_zd, t_u, t_zd, o_w, zero):
    """Block columns of Z from left to right: Z_c = (E_c + sum of Z_j U_jc) Z_cc."""
    b_zero = gl.zeros((BT, 16), gl.float32, CL)
    b_z = (gl.where(o_w == 0, b_zd, zero).to(gl.bfloat16),)
    a_z = (gl.convert_layout(b_z[0], CA),)
    for c in gl.static_range(1, 4):
        b_y = b_zero
        for j in gl.static_range(c):
            b_y = mma_v2(a_z[j], t_u.slice(16 * j, 16).slice(16 * c, 16, 1).load(CB), b_y)
        a_y = gl.convert_layout(b_y.to(gl.bfloat16), CA)
        b_y = gl.where(o_w == c, b_zd, zero)
        b_y = mma_v2(a_y, t_zd.slice(16 * c, 16).load(CB), b_y).to(gl.bfloat16)
        b_z = b_z + (b_y,)  # noqa: RUF005 -- Gluon has no starred elements
        a_z = a_z + (gl.convert_layout(b_y, CA),)  # noqa: RUF005
    b_z = gl.join(gl.join(b_z[0], b_z[1]), gl.join(b_z[2], b_z[3]))
    return gl.convert_layout(gl.reshape(b_z.permute((0, 3, 2, 1)), (BT, BT)), XL)


@gluon.jit
def refine(b_z, t_u, t_du, t_z, b_zero, offsets, zero):
    """A step of Newton's: ``(I + R) Z`` with the residual ``R = I + Z (U - I)``."""
    o_r, o_c, _, _, _ = offsets
    a_z = gl.convert_layout(b_z, XA)
    b_R = wgmma(a_z, t_u, b_zero, use_acc=False, is_async=True)
    b_R = wgmma(a_z, t_du, b_R, is_async=True)
    t_z.store(b_z)
    fence()
    gl.thread_barrier()
    b_R = wgmma_wait(0, deps=(b_R,))
    # Of Z (U - I) the diagonal is -1, of R it is 0.
    a_r = gl.convert_layout(gl.where(o_r == o_c, 1.0 + zero, b_R).to(gl.bfloat16), XA)
    b_Z = wgmma(a_r, t_z, b_zero, use_acc=False, is_async=True)
    return wgmma_wait(0, deps=(b_Z,))


@gluon.jit
def aux(tokens, mats, gates, scratch, bars, p_g, p_beta, place, C: gl.constexpr):
    """One warp group: the matrices of each chunk."""
    HV: gl.constexpr = C[0]
    full, full_m, free_m = bars
    t_u, t_du, t_p, t_z, t_zd = scratch
    i_b, _, i_hv, T = place
    NT = (T + BT - 1) // BT
    o_r = gl.arange(0, BT, layout=XR)[:, None]
    o_c = gl.arange(0, BT, layout=XC)[None, :]
    o_dr = gl.arange(0, 16, layout=gl.SliceLayout(0, DR))[None, :, None]
    o_dc = gl.arange(0, 16, layout=gl.SliceLayout(0, DC))[None, None, :]
    o_w = gl.arange(0, BT, layout=gl.SliceLayout(1, CL))[:, None] // 16
    offsets = (o_r, o_c, o_dr, o_dc, o_w)
    b_zero = gl.zeros((BT, BT), gl.float32, XL)
    # Of a known zero the compiler would choose after rounding, with halves of registers.
    zero = gl.where(T < 0, 1.0, 0.0)
    o_g = i_b * T * HV + i_hv
    b_g, b_beta = load_gates(p_g, p_beta, o_g, 0, T, HV)
    store_gates(gates, b_g, b_beta, 0)
    b_g, b_beta = load_gates(p_g, p_beta, o_g, 1, T, HV)
    gl.thread_barrier()
    b_KKQ = multiply_tokens(tokens[0], full, 0)
    b_KK = decay_products(b_KKQ, t_p, gates[2], 0, zero)
    for i in range(NT):
        sm = i % NM
        t_beta, t_tail = gates[3].index(i % NST), gates[4].index(i % NST)
        b_zd = store_factors(b_KK, t_beta, t_u, t_du, t_zd, offsets, zero)
        fence()
        gl.thread_barrier()
        b_z = substitute(b_zd, t_u, t_zd, o_w, zero)
        b_Z = refine(b_z, t_u, t_du, t_z, b_zero, offsets, zero) * t_beta.load(XR)[:, None]
        a_z = gl.convert_layout(b_Z.to(gl.bfloat16), XA)
        b_W = wgmma(a_z, t_p, b_zero, use_acc=False, is_async=True)
        b_Z = (b_Z * t_tail.load(XC)[None, :]).to(gl.bfloat16)
        mbarrier.wait(free_m.index(sm), ((i // NM) & 1) ^ 1)
        mats[0].index(sm).store(b_Z)
        # The scan has left the chunk whose place these gates take.
        store_gates(gates, b_g, b_beta, (i + 1) % NST)
        b_g, b_beta = load_gates(p_g, p_beta, o_g, i + 2, T, HV)
        b_W = wgmma_wait(0, deps=(b_W,))
        b_w = b_W.to(gl.bfloat16)
        # Of the last chunk once more, for nothing. Before the matrices are published, after which
        # the math groups keep the tensor cores.
        i_next = gl.minimum(i + 1, NT - 1)
        b_KKQ = multiply_tokens(tokens[0], full, i_next)
        mats[1].index(sm).store(b_w)
        fence()
        gl.thread_barrier()
        mbarrier.arrive(full_m.index(sm), count=1)
        b_KK = decay_products(b_KKQ, t_p, gates[2], i_next, zero)
