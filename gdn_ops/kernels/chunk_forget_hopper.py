"""The functions of chunk_forget.py, and ``find_chunk``, for kernels in Gluon, by four warps."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .chunk_scan_walk import plus

# Chunks of a segment and value head are in one thread.
LOOKED_AT = gl.constexpr(gl.BlockedLayout([32, 1], [1, 32], [1, 4], [0, 1]))
ROW = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def find_chunk(cu_seqlens, i_c, stride_cu_seqlens_n, N, BT, BN: gl.constexpr):
    """The sequence of place ``i_c``, and its chunk in it: past its end in a place left over."""
    i_n = i_c * 0 - 1
    for i_block in range(0, N, BN):
        o_n = i_block + gl.arange(0, BN, layout=ROW)
        b_start = gl.load(cu_seqlens + o_n * stride_cu_seqlens_n, o_n < N, 0).to(gl.int32)
        i_n = i_n + gl.sum(((b_start // BT + o_n <= i_c) & (o_n < N)).to(gl.int32), 0)
    i_start = gl.load(cu_seqlens + i_n * stride_cu_seqlens_n).to(gl.int32)
    return i_n, i_c - (i_start // BT + i_n)


@gluon.jit
def find_segment(i_s, T, B, BT: gl.constexpr, SEGMENTS: gl.constexpr, LEAST: gl.constexpr):
    """``segment_chunks``, and ``find_segment``."""
    all_chunks = gl.cdiv(T, BT)
    chunks = gl.maximum(gl.cdiv(all_chunks * B, SEGMENTS), LEAST)
    segments = gl.cdiv(all_chunks, chunks)
    return chunks, i_s // segments, i_s % segments


@gluon.jit
def find_forgotten(p_kept, chunks, HV: gl.constexpr, FORGOTTEN: gl.constexpr, LOOK: gl.constexpr):
    """Of the last LOOK of ``chunks`` the last that nothing is left of the state before; or 0."""
    i_c = chunks - LOOK + gl.arange(0, LOOK, layout=ROW)
    b_kept = gl.load(p_kept + i_c * HV, i_c >= 0, 0.0)
    b_kept = gl.associative_scan(b_kept, 0, plus, reverse=True)
    return gl.max(gl.where((i_c >= 0) & (b_kept < FORGOTTEN), i_c, 0), 0)


@gluon.jit
def find_forgotten_back(
    p_kept, chunks, HV: gl.constexpr, FORGOTTEN: gl.constexpr, LOOK: gl.constexpr
):
    """Of the first LOOK of ``chunks`` so many that nothing is left of a state after; or all."""
    i_c = gl.arange(0, LOOK, layout=ROW)
    b_kept = gl.load(p_kept + i_c * HV, i_c < chunks, 0.0)
    b_kept = gl.associative_scan(b_kept, 0, plus)
    return gl.min(gl.where((i_c < chunks) & (b_kept < FORGOTTEN), i_c + 1, chunks), 0)


@gluon.jit
def all_forget(
    kept,
    T,
    B,
    chunks,
    HV: gl.constexpr,
    BT: gl.constexpr,
    FORGOTTEN: gl.constexpr,
    LOOK: gl.constexpr,
    BN: gl.constexpr,
    IS_BACK: gl.constexpr = False,
):
    """Whether every segment of a batch may begin LOOK chunks earlier, or with its sequence.

    With IS_BACK whether walks from the last chunk to the first may, which begin after segments.
    """
    all_chunks = gl.cdiv(T, BT)
    ends = gl.cdiv(all_chunks, chunks) - 1
    o_c = gl.arange(0, LOOK, layout=gl.SliceLayout(1, LOOKED_AT))[:, None]
    if not IS_BACK:
        o_c = o_c - LOOK
    remember = ends * 0
    for i_first in range(0, B * ends * HV, BN):
        o_s = i_first + gl.arange(0, BN, layout=gl.SliceLayout(0, LOOKED_AT))
        i_end = (o_s // HV % ends + 1) * chunks
        o_kept = (o_s // HV // ends * all_chunks + i_end) * HV + o_s % HV
        m_s = (o_s < B * ends * HV) & ((all_chunks - i_end if IS_BACK else i_end) > LOOK)
        p_kept = kept + (o_kept[None, :] + o_c * HV)
        b_kept = gl.sum(gl.load(p_kept, m_s[None, :], FORGOTTEN), 0)
        # Written so that a NaN is remembered. The others are LOOK times FORGOTTEN.
        remember += gl.sum(gl.where(b_kept < FORGOTTEN, 0, 1), 0)
    return remember == 0
