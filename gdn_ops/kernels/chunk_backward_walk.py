"""What the stages of the backward that walk sequences share in Gluon: layouts, and addresses."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .chunk_backward_gates import BT
from .chunk_forget_hopper import all_forget, find_forgotten, find_forgotten_back, find_segment
from .chunk_scan_hopper import load_bounds_of_sequence
from .chunk_scan_walk import tile_layout

# Chunks whose tokens are in shared memory.
PLACES = gl.constexpr(3)
TILE, TILE_3 = gl.constexpr(tile_layout()), gl.constexpr(tile_layout(3))
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
def segment_of_program(
    kept, i_s, i_hv, T, B, HV: gl.constexpr, S: gl.constexpr, IS_BACK: gl.constexpr
):
    """What a program of a segment has: the row of the batch, and chunks of its sequence.

    Those that it walks, from the first to the one after the last, then those of them that it
    writes. Where not all segments forget (chunk_forget.py), the first program of a sequence has
    all, and others none.
    """
    SEGMENTS: gl.constexpr = S[0]
    LEAST: gl.constexpr = S[1]
    FORGOTTEN: gl.constexpr = S[2]
    LOOK: gl.constexpr = S[3]
    BN: gl.constexpr = S[4]
    all_chunks = gl.cdiv(T, BT)
    chunks, i_n, i_segment = find_segment(i_s, T, B, BT, SEGMENTS, LEAST)
    first = i_segment * chunks
    end = gl.minimum(first + chunks, all_chunks)
    p_kept = kept + (i_n * all_chunks * HV + i_hv)
    begin, stop = first, end
    if IS_BACK:
        rest = all_chunks - end
        stop = end + find_forgotten_back(p_kept + end * HV, rest, HV, FORGOTTEN, LOOK)
    else:
        begin = find_forgotten(p_kept, first, HV, FORGOTTEN, LOOK)
    is_early = all_forget(kept, T, B, chunks, HV, BT, FORGOTTEN, LOOK, BN, IS_BACK)
    whole = gl.where(i_segment == 0, all_chunks, 0)
    begin, first = gl.where(is_early, begin, 0), gl.where(is_early, first, 0)
    end, stop = gl.where(is_early, end, whole), gl.where(is_early, stop, whole)
    return i_n, begin, stop, first, end


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
