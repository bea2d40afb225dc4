"""The states that enter the segments of split sequences: ``S' = S M + C``, one after the other.

A program owns ``BV`` rows of the state of one sequence and value head. It reads the initial state,
from a pool where there is one, so that the scan, which writes the pool, need not read it.

Tensors, beside those of the glossary, of chunk_scan.py and of chunk_carry.py:

    carry           ``C`` and ``M`` of each segment but the last
    inverse         not read: its size is the number of tokens
    segment_states  [B, S, HV, V, K]  float32, contiguous: the state that enters segment S of a
                                      sequence, or that of place S where sequences are packed;
                                      places left over stay unwritten, and where all segments
                                      of a batch forget (chunk_forget.py) all but the first of a
                                      sequence. The main output
"""

import triton
import triton.language as tl

from .chunk_forget import all_forget, segment_chunks
from .chunk_prepare import load_bounds
from .output import store_output

AXES = {
    "carry": "bshrk",
    "inverse": "bthj",
    "kept": "ch",
    "state": "nhvk",
    "state_indices": "n",
    "has_initial_state": "n",
    "cu_seqlens": "n",
    "read_indices": "n",
    "segment_states": "bshvk",
}
SIZES = {"T": "inverse_t", "B": "carry_b"}


@triton.jit
def chain_kernel(
    carry,
    inverse,
    kept,
    state,
    state_indices,
    has_initial_state,
    cu_seqlens,
    read_indices,
    segment_states,
    stride_carry_b,
    stride_carry_s,
    stride_carry_h,
    stride_carry_r,
    stride_carry_k,
    stride_state_n,
    stride_state_h,
    stride_state_v,
    stride_state_k,
    stride_state_indices_n,
    stride_has_initial_state_n,
    stride_cu_seqlens_n,
    stride_read_indices_n,
    stride_segment_states_b,
    stride_segment_states_s,
    stride_segment_states_h,
    stride_segment_states_v,
    stride_segment_states_k,
    T,
    B,
    null_index: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    HAS_READ_INDICES: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    HAS_KEPT: tl.constexpr,
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
    """One sequence, value head and tile of V; the grid is ``N * HV * cdiv(V, BV)``."""
    tl.static_assert(BK >= K)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_hv = tl.program_id(0) // NV % HV
    i_n = tl.program_id(0) // (NV * HV)
    chunks = segment_chunks(T, B, BT, SEGMENTS, LEAST)
    tokens = chunks * BT
    i_b = i_n.to(tl.int64)
    i_s = i_b * 0
    length = T
    if HAS_KEPT:
        are_early = all_forget(kept, T, B, chunks, HV, BT, FORGOTTEN, LOOK, BN)
        length = tl.where(are_early, 0, T)
    if IS_VARLEN:
        N = tl.num_programs(0) // (NV * HV)
        i_start, length = load_bounds(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        i_s = i_b + i_start // tokens
        i_b = i_b * 0

    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = (o_k < K)[None, :]
    m_state = (o_v < V)[:, None] & m_k
    b_S = tl.zeros((BV, BK), tl.float32)
    if HAS_STATE:
        i_read = i_n.to(tl.int64)
        m_read = m_state
        if HAS_READ_INDICES:
            i_read = tl.load(read_indices + i_n * stride_read_indices_n).to(tl.int64)
            m_read &= i_read > null_index
        elif HAS_INDICES:
            i_read = tl.load(state_indices + i_n * stride_state_indices_n).to(tl.int64)
            m_read &= i_read > null_index
        if HAS_INITIAL_STATE:
            m_read &= tl.load(has_initial_state + i_n * stride_has_initial_state_n) != 0
        p_state = state + i_read * stride_state_n + i_hv * stride_state_h
        p_state += o_v[:, None] * stride_state_v + o_k[None, :] * stride_state_k
        b_S = tl.load(p_state, m_read, 0.0).to(tl.float32)

    p_C = carry + i_b * stride_carry_b + i_s * stride_carry_s + i_hv * stride_carry_h
    p_M = p_C + (V + o_k)[:, None] * stride_carry_r + o_k[None, :] * stride_carry_k
    p_C += o_v[:, None] * stride_carry_r + o_k[None, :] * stride_carry_k
    for i_t in range(0, tl.maximum(length, 1), tokens):
        store_output(
            segment_states,
            (i_b, i_s, i_hv, o_v[:, None], o_k[None, :]),
            (
                stride_segment_states_b,
                stride_segment_states_s,
                stride_segment_states_h,
                stride_segment_states_v,
                stride_segment_states_k,
            ),
            b_S,
            m_state,
        )
        is_next = i_t + tokens < length
        b_M = tl.load(p_M, (o_k < K)[:, None] & m_k & is_next, 0.0)
        b_C = tl.load(p_C, m_state & is_next, 0.0)
        b_S = tl.dot(b_S, b_M, b_C, input_precision=PRECISION)
        i_s += 1
        p_M += stride_carry_s
        p_C += stride_carry_s
