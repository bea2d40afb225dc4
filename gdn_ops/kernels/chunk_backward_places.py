"""Where the chunks of packed sequences are: what a program of many chunks would search for each.

Of each place (``find_chunk`` of chunk_prepare.py) two numbers,

    places    [places, 2]  its first token, and how many of its tokens are of a sequence: none, or a
                           negative number, in a place left over, and of tokens past the last bound
"""

import triton
import triton.language as tl

from .chunk_prepare import find_chunk, load_bounds

# Bounds of sequences that a program reads at once to find its chunk.
PLACE_BN = 128


@triton.jit
def chunk_places_kernel(
    cu_seqlens, places, stride_cu_seqlens_n, T, BT: tl.constexpr, BN: tl.constexpr
):
    """One place; the grid is their number."""
    i_place = tl.program_id(0)
    N = tl.num_programs(0) - tl.cdiv(T, BT)
    # The tokens past the last bound count as one more sequence, of which none is valid.
    i_n, i_t = find_chunk(cu_seqlens, i_place, stride_cu_seqlens_n, N + 1, BT, BN)
    i_start, length = load_bounds(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
    tl.store(places + 2 * i_place, tl.minimum(i_start + i_t * BT, T))
    tl.store(places + 2 * i_place + 1, tl.where(i_n < N, length - i_t * BT, 0))


@triton.jit
def clear_rows(p_x, i_first, end, T, WIDTH: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    """Zeros to the rows of a tile that are not before ``end``."""
    o_t = (i_first + tl.arange(0, BT)).to(tl.int64)[:, None]
    m_t = (o_t >= end) & (o_t < T)
    for i in range(0, WIDTH, BW):
        o_w = i + tl.arange(0, BW)[None, :]
        b_zero = tl.zeros((BT, BW), p_x.dtype.element_ty)
        tl.store(p_x + o_t * WIDTH + o_w, b_zero, m_t & (o_w < WIDTH))


@triton.jit
def chunk_padding_kernel(
    cu_seqlens,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    stride_cu_seqlens_n,
    N,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_BETA: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
):
    """The gradients of BT tokens, where they are of no sequence; the grid is ``cdiv(T, BT)``."""
    end = tl.load(cu_seqlens + N * stride_cu_seqlens_n).to(tl.int32)
    i_first = tl.program_id(0) * BT
    if i_first + BT <= end:
        return
    clear_rows(dq, i_first, end, T, H * K, BT, BW)
    clear_rows(dk, i_first, end, T, H * K, BT, BW)
    clear_rows(dv, i_first, end, T, HV * V, BT, BW)
    if HAS_G:
        clear_rows(dg, i_first, end, T, HV, BT, BW)
    if HAS_BETA:
        clear_rows(dbeta, i_first, end, T, HV, BT, BW)
