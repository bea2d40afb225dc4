"""What the stages of the backward that walk sequences share in Gluon: layouts, and addresses."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .chunk_backward_gates import BT
from .chunk_scan_hopper import load_bounds_of_sequence
from .chunk_scan_walk import tile_layout

# Chunks whose tokens are in shared memory.
PLACES = gl.constexpr(3)
TILE, TILE_3 = gl.constexpr(tile_layout()), gl.constexpr(tile_layout(3))
# States [V, K], and what is multiplied by them [V, BT]; as left operands; rows and columns.
SL, XL = (gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16])) for n in (128, 64))
SA, XA = (gl.constexpr(gl.DotOperandLayout(0, x, 2)) for x in (SL, XL))
SR, SC, XR, XC = (gl.constexpr(gl.SliceLayout(n, x)) for x in (SL, XL) for n in (1, 0))
# A state as descriptors of places have it.
STATE = gl.constexpr([1, 64, 128])


@gluon.jit
def sequence_of_program(
    cu_seqlens, stride_cu_seqlens_n, T, HV: gl.constexpr, NV: gl.constexpr, IS_VARLEN: gl.constexpr
):
    """Tile of V, value head, sequence; row of the batch, first token, first place, and length."""
    i_v = gl.program_id(0) % NV
    i_hv = gl.program_id(0) // NV % HV
    i_n = gl.program_id(0) // (NV * HV)
    # No constant, also of one token.
    length = i_n * 0 + T
    i_b = i_n.to(gl.int64)
    i_first = i_b * 0
    i_place = i_b * gl.cdiv(T, BT)
    if IS_VARLEN:
        N = gl.num_programs(0) // (NV * HV)
        i_start, length = load_bounds_of_sequence(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        i_first = i_start.to(gl.int64)
        i_b = i_b * 0
        i_place = (i_start // BT + i_n).to(gl.int64)
    return i_v, i_hv, i_n, i_b, i_first, i_place, length


@gluon.jit
def addresses_of_gates(
    G, beta, beta_strides, i_b, i_first, i_place, i_hv, HV: gl.constexpr, HAS_BETA: gl.constexpr,
    NORMS: gl.constexpr,
):  # fmt: skip
    """Log decays and beta of a sequence and value head, and the step between tokens' beta."""
    stride_b, stride_t, stride_h = beta_strides
    p_G = G + (i_place * HV + i_hv) * ((3 if NORMS else 1) * BT)
    p_beta = p_G  # of what is absent there is no pointer
    if HAS_BETA:
        p_beta = beta + i_b * stride_b + i_first * stride_t + i_hv * stride_h
    return p_G, p_beta, stride_t
