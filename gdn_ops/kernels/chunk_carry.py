"""What a segment of a long sequence does to the state that enters it: ``S' = S M + C``.

A sequence that is split into segments has them walked side by side. Every chunk maps the state
linearly, so a segment does too: ``C [V, K]`` is what it makes of no state, ``M [K, K]`` what it
makes of the identity where no token has a value. Both are the walk of chunk_scan.py without its
output, rows of ``M`` beside rows of ``C``:

    x  = v^T - exp(G) (S k^T)                    of M without v^T
    S' = exp(G_last) S + (x inverse^T) k

Where a segment forgets (chunk_forget.py), ``M`` is zero, and the walk of ``C`` begins with the
chunks that it is made of. Where all do, in a batch, nothing is written: the scan needs none.

Tensors, beside those of the glossary and of chunk_scan.py:

    carry   [B, S, HV, V + K, K]  float32, contiguous: C, then M, of segment S of a sequence, or of
                                  place S where sequences are packed; the last of a sequence, which
                                  nobody reads, stays unwritten. The main output

Tiles and flags as in chunk_scan.py; ``SEGMENTS`` that all chunks of a call are split into, about,
``LEAST`` chunks of one, and ``FORGOTTEN`` and ``LOOK`` of chunk_forget.py.
"""

import triton
import triton.language as tl

from .chunk_forget import all_forget, find_forgotten, find_segment, segment_chunks
from .chunk_prepare import find_chunk, load_bounds
from .output import store_output

AXES = {
    "k": "bthk",
    "v": "bthv",
    "inverse": "bthj",
    "decays": "chrt",
    "kept": "ch",
    "cu_seqlens": "n",
    "carry": "bshrk",
}
SIZES = {"T": "k_t", "B": "k_b"}


@triton.jit
def carry_kernel(
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
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LEAST: tl.constexpr,
    FORGOTTEN: tl.constexpr,
    LOOK: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
):
    """A tile of rows of one segment and value head; the grid is ``places * HV * NR``."""
    tl.static_assert(BK >= K)
    NV: tl.constexpr = (V + BV - 1) // BV
    NR: tl.constexpr = NV + (K + BV - 1) // BV
    i_r = tl.program_id(0) % NR
    i_hv = tl.program_id(0) // NR % HV
    i_s = tl.program_id(0) // (NR * HV)
    i_h = i_hv // (HV // H)
    chunks = segment_chunks(T, B, BT, SEGMENTS, LEAST)
    if IS_VARLEN:
        N = tl.num_programs(0) // (NR * HV) - tl.cdiv(T, chunks * BT)
        i_n, i_segment = find_chunk(cu_seqlens, i_s, stride_cu_seqlens_n, N, chunks * BT, BN)
        i_start, length = load_bounds(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        i_first = i_start.to(tl.int64)
        i_place = i_first // BT + i_n
        i_b = i_first * 0
    else:
        i_n, i_segment = find_segment(i_s, T, chunks, BT)
        length = T
        if HAS_KEPT:
            are_early = all_forget(kept, T, B, chunks, HV, BT, FORGOTTEN, LOOK, BN)
            length = tl.where(are_early, 0, T)
        i_b = i_n.to(tl.int64)
        i_first = i_b * 0
        i_place = i_b * tl.cdiv(T, BT)
    i_skip = i_segment * (chunks * BT)
    # The last segment, and places left over, hand nothing on.
    if i_skip + chunks * BT < length:
        length = chunks * BT
        i_first += i_skip
        i_place += i_segment * chunks
        is_value = i_r < NV
        if HAS_KEPT:
            i_chunk = find_forgotten(kept + i_place * HV + i_hv, chunks, HV, FORGOTTEN, LOOK)
            is_forgotten = i_chunk > 0
            # Of the identity nothing is left.
            i_chunk = tl.where(is_forgotten & ~is_value, chunks, i_chunk)
            length -= i_chunk * BT
            i_first += i_chunk * BT
            i_place += i_chunk

        o_i = tl.arange(0, BT)
        o_k = tl.arange(0, BK)
        o_v = i_r * BV + tl.arange(0, BV)
        o_r = o_v - NV * BV
        b_S = tl.where((o_r[:, None] == o_k[None, :]) & (o_r < K)[:, None], 1.0, 0.0)
        if HAS_KEPT:
            b_S = tl.where(is_forgotten, 0.0, b_S)

        p_k = k + i_b * stride_k_b + i_first * stride_k_t + i_h * stride_k_h
        p_v = v + i_b * stride_v_b + i_first * stride_v_t + i_hv * stride_v_h
        p_inverse = inverse + ((i_b * T + i_first) * HV + i_hv) * BT
        ROWS: tl.constexpr = 3 if USE_QK_L2NORM else 2
        p_decays = decays + (i_place * HV + i_hv) * (ROWS * BT)
        if USE_DESCRIPTORS:
            d_k = tl.make_tensor_descriptor(p_k, [length, K], [stride_k_t, 1], [BT, BK])
            d_v = tl.make_tensor_descriptor(p_v, [length, V], [stride_v_t, 1], [BT, BV])
            d_inverse = tl.make_tensor_descriptor(p_inverse, [length, BT], [HV * BT, 1], [BT, BT])
            d_decays = tl.make_tensor_descriptor(p_decays, [length * (HV * ROWS)], [1], [BT])
        # Read a chunk ahead: Triton does so only for what leads to the operands of a product.
        p_last = p_decays + (ROWS - 1) * BT
        b_next = tl.load(p_last)
        for i_t in range(0, length, BT):
            o_row = (i_t + o_i).to(tl.int64)[:, None]
            b_last = b_next
            p_last += HV * ROWS * BT
            b_next = tl.load(p_last, i_t + BT < length, 0.0)
            if USE_DESCRIPTORS:
                b_k = d_k.load([i_t, 0])
            else:
                p_row = p_k + o_row * stride_k_t + o_k[None, :] * stride_k_k
                b_k = tl.load(p_row, (o_k < K)[None, :], 0.0)
            b_x = tl.dot(b_S.to(DOT), tl.trans(b_k).to(DOT), input_precision=PRECISION)
            if USE_DESCRIPTORS:
                b_decay = d_decays.load([i_t * (HV * ROWS)])
                if USE_QK_L2NORM:
                    b_decay *= d_decays.load([i_t * (HV * ROWS) + BT])
                # A row of M has no values: past the end they are zero.
                b_v = d_v.load([tl.where(is_value, i_t, length), i_r * BV])
                b_inverse = d_inverse.load([i_t, 0])
            else:
                p_decay = p_decays + i_t * (HV * ROWS) + o_i
                b_decay = tl.load(p_decay)
                if USE_QK_L2NORM:
                    b_decay *= tl.load(p_decay + BT)
                p_row = p_v + o_row * stride_v_t + o_v[None, :] * stride_v_v
                b_v = tl.load(p_row, (o_v < V)[None, :] & is_value, 0.0)
                b_inverse = tl.load(p_inverse + o_row * (HV * BT) + o_i[None, :])
            b_x = tl.trans(b_v).to(tl.float32) - b_x * b_decay.to(tl.float32)[None, :]
            b_u = tl.dot(b_x.to(DOT), tl.trans(b_inverse).to(DOT), input_precision=PRECISION)
            b_S *= b_last.to(tl.float32)
            b_S = tl.dot(b_u.to(DOT), b_k.to(DOT), b_S, input_precision=PRECISION)

        o_row = tl.where(is_value, o_v, V + o_r)
        m_row = tl.where(is_value, o_v < V, o_r < K)
        i_row = i_s.to(tl.int64)
        i_batch = i_row * 0
        if not IS_VARLEN:
            i_batch += i_n
            i_row = i_row * 0 + i_segment
        store_output(
            carry,
            (i_batch, i_row, i_hv, o_row[:, None], o_k[None, :]),
            (stride_carry_b, stride_carry_s, stride_carry_h, stride_carry_r, stride_carry_k),
            b_S,
            m_row[:, None] & (o_k < K)[None, :],
        )
