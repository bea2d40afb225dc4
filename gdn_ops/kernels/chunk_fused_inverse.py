"""The role of chunk_fused_hopper.py that inverts: from the factors of each chunk what it adds.

With D_ij = exp(G_i - G_j), the strictly upper U_ij = -beta_j D_ji <k_i, k_j> for j > i, and Z the
transpose of chunk_prepare.py's X, Z = (N - U)^-1, it makes

    inverse^T = diag(beta) Z

N is I. With USE_QK_L2NORM k is what it was before it was normalised, and N_i = <k_i, k_i> + 1e-6;
beta is then divided by the norm, and each result is what it is of normalised keys, times theirs.

It works on transposes so that the right operand of each product is in memory before the left, which
stays in registers. The walks have stored U as a sum of two of bfloat16, and the diagonal blocks of
16 x 16 of it as float32. Of a chunk, in this order:

1. ``invert_blocks``: the diagonal blocks of N - U, one in each warp, by FFMA.
2. ``substitute``: substitution by block columns, by mma.sync. Warp w has rows 16 w to 16 w + 15 of
   all of them, so no left operand leaves its warp.
3. ``refine``: a step of Newton's with both parts of U takes back what rounding to bfloat16 lost in
   1 and 2 (wgmma).

``a_`` is a block ``b_`` as a left operand, ``t_`` a tile of shared memory, ``s_`` stages of one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    mma_v2,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .chunk_scan_walk import XA, XC, XL, XR, group_barrier

# Tokens of a chunk; stages of tokens and gates, and of matrices.
BT, STAGES, SLOTS = gl.constexpr(64), gl.constexpr(3), gl.constexpr(2)
# Sums of mma.sync, blocks of 16 and block columns 64 x 16. Then, as in chunk_scan_walk.py, their
# left operands (A), right operands (B), rows (R) and columns (C).
DL = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))
CL = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
CA, CB = (gl.constexpr(gl.DotOperandLayout(n, CL, 2)) for n in (0, 1))
DR, DC = (gl.constexpr(gl.SliceLayout(n, DL)) for n in (2, 1))
# Tiles of tokens; matrices, whose blocks of 16 columns lie apart, so that one can be read alone;
# rows of gates.
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
NARROW = gl.constexpr(gl.NVMMASharedLayout(32, 16, rank=2))
# Blocks of 16, a row in each lane.
BL = gl.constexpr(gl.BlockedLayout([1, 1, 16], [1, 32, 1], [4, 1, 1], [2, 1, 0]))
ROW, ROWS = (gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, x)) for x in ([0], [1, 0]))
CUBE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@gluon.jit
def row_of_blocks(t_row):
    """A row of ``BT`` numbers as one of each block of 16."""
    return t_row._reinterpret(gl.float32, [4, 16], ROWS)


@gluon.jit
def bits_of_either(a, b):
    return a | b


@gluon.jit
def column(b_x, o_c, i: gl.constexpr):
    """Column ``i`` of each ``[16, 16]``, which a thread has: no instruction is left of it."""
    b_bits = gl.where(o_c == i, b_x.to(gl.int32, bitcast=True), 0)
    return gl.reduce(b_bits, 2, bits_of_either).to(gl.float32, bitcast=True)[:, :, None]


@gluon.jit
def invert_blocks(t_d, t_zd, s_norms, i_stage, USE_QK_L2NORM: gl.constexpr):
    """The inverses of the diagonal blocks of N - U, to memory ``[BT, 16]``.

    By substitution, z_c = (e_c + sum of z_j U_jc for j < c) / N_c, where a lane has a row of its
    warp's block: tensor cores are busy, and a chain of small products would wait for each.
    """
    o_r = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, BL)))[None, :, None]
    o_c = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, BL)))[None, None, :]
    # Opaque, as a loop would keep what it is compared with in registers that it has not.
    o_r = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [o_r], gl.int32, False, 1)
    b_sums = gl.where(o_r == o_c, 1.0, 0.0) + gl.zeros((4, 16, 16), gl.float32, BL)
    b_z = b_sums
    if USE_QK_L2NORM:
        b_norm = row_of_blocks(s_norms.index(4 * i_stage)).load(gl.SliceLayout(1, BL))
        b_norm = (b_norm * b_norm)[:, None, :]
    for i in gl.static_range(16):
        b_zi = column(b_sums, o_c, i)
        if USE_QK_L2NORM:
            b_zi = b_zi * column(b_norm, o_c, i)
        b_z = gl.where(o_c == i, b_zi, b_z)
        b_sums += b_zi * t_d.slice(i, 1, 1).load(BL)
    t_zd.store(gl.reshape(b_z, (BT, 16)).to(gl.bfloat16))


@gluon.jit
def round_operand(b_x):
    """A float32 operand, rounded to bfloat16: that, and minus the same as float32."""
    asm: gl.constexpr = """{
        cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; xor.b32 $1, $1, 0x80000000;
        and.b32 $2, $0, 0xffff0000; xor.b32 $2, $2, 0x80000000;
    }"""
    dtypes: gl.constexpr = (gl.bfloat16, gl.float32)
    return gl.inline_asm_elementwise(asm, "=&r,=&r,=r,r,r", [b_x], dtypes, is_pure=True, pack=2)


@gluon.jit
def beside_each_other(blocks):
    """Four block columns as one matrix."""
    b_x = gl.join(gl.join(blocks[0], blocks[1]), gl.join(blocks[2], blocks[3]))
    return gl.convert_layout(gl.reshape(b_x.permute((0, 3, 2, 1)), (BT, BT)), XL)


@gluon.jit
def substitute(t_u, t_zd, zero):
    """Z and -Z by block columns, left to right: Z_c = (E_c + sum of Z_j U_jc) Z_cc."""
    o_w = gl.arange(0, BT, layout=gl.SliceLayout(1, CL))[:, None] // 16
    b_zero = gl.zeros((BT, 16), gl.float32, CL)
    b_zd = t_zd.load(CL).to(gl.float32)
    b_z, b_minus = round_operand(gl.where(o_w == 0, b_zd, zero))
    z, minus, a_z = (b_z,), (b_minus,), (gl.convert_layout(b_z, CA),)
    for c in gl.static_range(1, 4):
        b_y = b_zero
        for j in gl.static_range(c):
            b_y = mma_v2(a_z[j], t_u.slice(16 * j, 16).slice(16 * c, 16, 1).load(CB), b_y)
        a_y = gl.convert_layout(b_y.to(gl.bfloat16), CA)
        b_y = gl.where(o_w == c, b_zd, zero)
        b_y = mma_v2(a_y, t_zd.slice(16 * c, 16).load(CB), b_y)
        b_z, b_minus = round_operand(b_y)
        z = z + (b_z,)  # noqa: RUF005 -- Gluon has no starred elements
        minus = minus + (b_minus,)  # noqa: RUF005
        a_z = a_z + (gl.convert_layout(b_z, CA),)  # noqa: RUF005
    return beside_each_other(z), beside_each_other(minus)


@gluon.jit
def refine(b_z, b_R, t_u, t_du, t_z, zero):
    """A step of Newton's: ``(I + R) Z`` with the residual ``R = I + Z U - Z N``; b_R is -Z N."""
    o_r = gl.arange(0, BT, layout=XR)[:, None]
    o_c = gl.arange(0, BT, layout=XC)[None, :]
    b_zero = gl.zeros((BT, BT), gl.float32, XL)
    a_z = gl.convert_layout(b_z, XA)
    b_R = warpgroup_mma(a_z, t_u, b_R, is_async=True)
    b_R = warpgroup_mma(a_z, t_du, b_R, is_async=True)
    t_z.store(b_z)
    fence_async_shared()
    group_barrier()
    b_R = warpgroup_mma_wait(0, deps=(b_R,))
    # Of Z U - Z N the diagonal is -1, of R it is 0.
    a_r = gl.convert_layout(gl.where(o_r == o_c, 1.0 + zero, b_R).to(gl.bfloat16), XA)
    b_Z = warpgroup_mma(a_r, t_z, b_zero, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(b_Z,))


@gluon.jit
def invert(tiles, factors, gates, bars, tokens, addresses, chunks, C: gl.constexpr):
    """The role of one warp group: the inverse of each chunk, from the factors that walks store."""
    USE_QK_L2NORM: gl.constexpr = C[4]
    s_u, s_du, s_d, t_zd, s_inverse, _ = factors
    _, _, _, s_beta, _, s_norms = gates
    _, _, full_u, full_m, _ = bars
    # Of a known zero the compiler would choose after rounding, with halves of registers.
    zero = gl.where(chunks < 0, 1.0, 0.0)
    for i in range(chunks):
        i_stage, i_slot = i % STAGES, i % SLOTS
        mbarrier.wait(full_u.index(i_slot), (i // SLOTS) & 1)
        t_u, t_inverse = s_u.index(i_slot), s_inverse.index(i_slot)
        invert_blocks(s_d.index(i_slot), t_zd, s_norms, i_stage, USE_QK_L2NORM)
        group_barrier()
        b_z, b_R = substitute(t_u, t_zd, zero)
        if USE_QK_L2NORM:
            b_R = b_R * s_norms.index(4 * i_stage + 1).load(XC)[None, :]
        b_Z = refine(b_z, b_R, t_u, s_du.index(i_slot), t_inverse, zero)
        b_beta = s_beta.index(i_stage).load(XR)
        if USE_QK_L2NORM:
            b_beta = b_beta * s_norms.index(4 * i_stage).load(XR)
            b_beta = b_beta * s_norms.index(4 * i_stage + 1).load(XR)
        # Every warp has read what is there.
        group_barrier()
        t_inverse.store((b_Z * b_beta[:, None]).to(gl.bfloat16))
        fence_async_shared()
        group_barrier()
        mbarrier.arrive(full_m.index(i_slot), count=1)
