"""Segments of long sequences, and what is left of a state when one begins.

Segments have a length in chunks, the same for all (``segment_chunks``), and places: in a batch
``cdiv(T, BT)`` over that length for a sequence; of packed sequences number n has the places from
``cu_seqlens[n]`` over the tokens of a segment, plus n, on, as chunks have in chunk_prepare.py.

A token maps the state by ``exp(g) (I - beta k k^T)``, whose norm is ``exp(g)`` times the larger of
1 and ``|1 - beta |k|^2|``. Where those of the LOOK chunks before a segment are less than ``2 **
FORGOTTEN`` together, the state that enters it is what these chunks make of none.

Tensors, beside those of the glossary:

    kept  [places, HV]  float32, of each place of a chunk that is one of the last LOOK of a segment,
                        and with AT_STARTS one of the first: the sum of log2 of what is above, or a
                        little more
"""

import triton
import triton.language as tl

from .chunk_prepare import find_chunk, load_bounds
from .norm import squares


@triton.jit
def segment_chunks(T, B, BT: tl.constexpr, SEGMENTS: tl.constexpr, LEAST: tl.constexpr):
    """Chunks of a segment."""
    return tl.maximum(tl.cdiv(tl.cdiv(T, BT) * B, SEGMENTS), LEAST)


@triton.jit
def find_segment(i_s, T, chunks, BT: tl.constexpr):
    """The row of a batch that place ``i_s`` is in, and its segment there."""
    segments = tl.cdiv(tl.cdiv(T, BT), chunks)
    return i_s // segments, i_s % segments


@triton.jit
def find_forgotten(p_kept, chunks, HV: tl.constexpr, FORGOTTEN: tl.constexpr, LOOK: tl.constexpr):
    """Of the last LOOK of ``chunks`` the last that nothing is left of the state before; or 0."""
    i_c = chunks - LOOK + tl.arange(0, LOOK)
    b_kept = tl.load(p_kept + i_c * HV, i_c >= 0, 0.0)
    b_kept = tl.cumsum(b_kept, 0, reverse=True)
    return tl.max(tl.where((i_c >= 0) & (b_kept < FORGOTTEN), i_c, 0), 0)


@triton.jit
def all_forget(
    kept,
    T,
    B,
    chunks,
    HV: tl.constexpr,
    BT: tl.constexpr,
    FORGOTTEN: tl.constexpr,
    LOOK: tl.constexpr,
    BN: tl.constexpr,
):
    """Whether every segment of a batch may begin LOOK chunks earlier, or with its sequence.

    BN segments of value heads are looked at together.
    """
    all_chunks = tl.cdiv(T, BT)
    ends = tl.cdiv(all_chunks, chunks) - 1
    o_c = tl.arange(0, LOOK)[:, None] - LOOK
    remember = 0
    for i_first in range(0, B * ends * HV, BN):
        o_s = i_first + tl.arange(0, BN)
        i_end = (o_s // HV % ends + 1) * chunks
        o_kept = (o_s // HV // ends * all_chunks + i_end) * HV + o_s % HV
        m_s = (o_s < B * ends * HV) & (i_end > LOOK)
        p_kept = kept + (o_kept[None, :] + o_c * HV)
        b_kept = tl.sum(tl.load(p_kept, m_s[None, :], FORGOTTEN), 0)
        # Written so that a NaN is remembered. The others are LOOK times FORGOTTEN.
        remember += tl.sum(tl.where(b_kept < FORGOTTEN, 0, 1), 0)
    return remember == 0


@triton.jit
def kept_kernel(
    k,
    g,
    beta,
    cu_seqlens,
    kept,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_k_k,
    stride_g_b,
    stride_g_t,
    stride_g_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    stride_cu_seqlens_n,
    T,
    B,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_BETA: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    AT_STARTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LEAST: tl.constexpr,
    LOOK: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
):
    """One chunk of a segment and key head; the grid is ``segments * LOOK * H``, or twice that."""
    SIDES: tl.constexpr = 2 if AT_STARTS else 1
    i_h = tl.program_id(0) % H
    i_look = tl.program_id(0) // H % (LOOK * SIDES)
    i_s = tl.program_id(0) // (H * LOOK * SIDES)
    chunks = segment_chunks(T, B, BT, SEGMENTS, LEAST)
    if IS_VARLEN:
        N = tl.num_programs(0) // (H * LOOK * SIDES) - tl.cdiv(T, chunks * BT)
        i_n, i_segment = find_chunk(cu_seqlens, i_s, stride_cu_seqlens_n, N, chunks * BT, BN)
        i_start, length = load_bounds(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        i_place = i_start // BT + i_n
        i_b = i_n.to(tl.int64) * 0
    else:
        i_n, i_segment = find_segment(i_s, T, chunks, BT)
        i_place = i_n * tl.cdiv(T, BT)
        i_start = 0
        length = T
        i_b = i_n.to(tl.int64)
    # Of the last segment, which hands nothing on, no end is looked at.
    i_chunk = (i_segment + 1) * chunks - 1 - i_look
    is_seen = (i_chunk >= i_segment * chunks) & ((i_segment + 1) * chunks * BT < length)
    if AT_STARTS:
        i_start_chunk = i_segment * chunks + i_look - LOOK
        m_start = (i_look - LOOK < chunks) & (i_segment > 0) & (i_start_chunk * BT < length)
        is_seen = tl.where(i_look < LOOK, is_seen, m_start)
        i_chunk = tl.where(i_look < LOOK, i_chunk, i_start_chunk)
    if is_seen:
        o_i = i_chunk * BT + tl.arange(0, BT)
        m_t = (o_i < length)[:, None]
        o_t = (i_start + o_i).to(tl.int64)[:, None]
        o_h = tl.arange(0, BH)
        m_h = (o_h < HV // H)[None, :]
        o_hv = i_h * (HV // H) + o_h[None, :]
        b_erased = tl.full((BT, BH), 1.0, tl.float32)
        if not USE_QK_L2NORM:
            o_k = tl.arange(0, BK)[None, :]
            p_k = k + i_b * stride_k_b + o_t * stride_k_t + i_h * stride_k_h + o_k * stride_k_k
            b_erased *= squares(tl.load(p_k, m_t & (o_k < K), 0.0).to(tl.float32))[:, None]
        if HAS_BETA:
            p_beta = beta + i_b * stride_beta_b + o_t * stride_beta_t + o_hv * stride_beta_h
            b_erased *= tl.load(p_beta, m_t & m_h, 0.0).to(tl.float32)
        # The logarithm of what is at least 1 is at most what it is above 1. Of normalised keys the
        # square is 1 or less, which changes neither side.
        b_kept = tl.maximum(tl.abs(1.0 - b_erased) - 1.0, 0.0)
        if HAS_G:
            p_g = g + i_b * stride_g_b + o_t * stride_g_t + o_hv * stride_g_h
            b_kept += tl.load(p_g, m_t & m_h, 0.0).to(tl.float32)
        p_kept = kept + (i_place + i_chunk).to(tl.int64) * HV + o_hv
        tl.store(p_kept, tl.sum(b_kept, 0)[None, :] * 1.4426950408889634, m_h)
