"""The scan over chunks: what the state reads and writes, and the output, in one kernel.

A program owns ``BV`` rows of the state of one sequence and value head, transposed with
regard to most texts: ``S [V, K]``. It walks the chunks, and every product has its left operand in
registers, where the product before left it (columns are tokens):

    x  = v^T - exp(G) (S k^T)
    o  = (exp(G) (S q^T) + x weights^T) scale
    S' = exp(G_last) S + (x inverse^T) k

``inverse`` and ``weights``, from chunk_prepare.py, are all that the tokens of a chunk do to each
other; beta and the decays between tokens are in them. With USE_QK_L2NORM keys and queries come as
they are, and their norms are in those two and in the factors of the columns.

Tensors, beside those of the glossary and of chunk_prepare.py:

    decays       ``G`` of chunk_prepare.py
    state        read: the initial states, or the pool
    final_state  written: the final states, or with IS_POOL the pool once more
    segment_states  [B, S, HV, V, K]  float32, contiguous, of chunk_chain.py: the state that enters
                 each segment, where sequences are split; ``state`` is then not read. Absent where
                 those of a batch are walked whole unless all segments forget (chunk_forget.py);
                 not with IS_POOL, whose first state the last segment may have replaced

Where all segments of a batch forget, a program begins before its own tokens with those that its
state is made of, and stores nothing of their output.

Tiles and flags: ``BT`` tokens of a chunk; ``BK >= K``; ``BV`` rows of a state; ``DOT`` the dtype of
operands; ``PRECISION`` the ``input_precision`` of float32 products; ``INDEX`` the dtype of a
token's index in ``o``, int64 where its offset may pass 2**31; ``SEGMENTS``, ``LEAST``,
``FORGOTTEN`` and ``LOOK`` of chunk_forget.py, 1 and 0 where sequences are whole; BN segments are
looked at together. With USE_DESCRIPTORS tokens are loaded by tensor descriptors, with
USE_DESCRIPTOR_STORE the output is stored by one, where nothing is fused into its store: both need
heads that start and end at multiples of 16 bytes, without gaps.
The output of a chunk is then put together and stored while the next chunk is computed, so that no
product of the state waits for one of the output: Triton waits for a product where its result is
used in the same round of a loop. With STORES_FIRST that comes before the decays are loaded, which
needs fewer registers and takes 5 % more time (1 x 8192 on an H200, Triton 3.6, 2026-11-29).
"""

import triton
import triton.language as tl

from .chunk_forget import all_forget, find_forgotten, find_segment, segment_chunks
from .chunk_prepare import find_chunk, load_bounds
from .output import store_output

AXES = {
    "q": "bthk",
    "k": "bthk",
    "v": "bthv",
    "inverse": "bthj",
    "weights": "bthj",
    "decays": "chrt",
    "kept": "ch",
    "state": "nhvk",
    "segment_states": "bshvk",
    "final_state": "nhvk",
    "state_indices": "n",
    "has_initial_state": "n",
    "cu_seqlens": "n",
    "read_indices": "n",
    "o": "bthv",
}
SIZES = {"T": "q_t", "B": "segment_states_b"}


@triton.jit
def late_output(b_o, b_rise, b_p, scale: tl.constexpr):
    """The output of a chunk ``[BT, BV]``, of both its products and the decays of the first."""
    return tl.trans((b_o * b_rise[None, :] + b_p) * scale)


@triton.jit
def scan_kernel(
    q,
    k,
    v,
    inverse,
    weights,
    decays,
    kept,
    state,
    segment_states,
    final_state,
    state_indices,
    has_initial_state,
    cu_seqlens,
    read_indices,
    o,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_q_k,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_k_k,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_v_v,
    stride_state_n,
    stride_state_h,
    stride_state_v,
    stride_state_k,
    stride_final_state_n,
    stride_final_state_h,
    stride_final_state_v,
    stride_final_state_k,
    stride_state_indices_n,
    stride_has_initial_state_n,
    stride_cu_seqlens_n,
    stride_read_indices_n,
    stride_o_b,
    stride_o_t,
    stride_o_h,
    stride_o_v,
    T,
    B,
    scale: tl.constexpr,
    null_index: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    HAS_READ_INDICES: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    IS_POOL: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    HAS_SEGMENT_STATES: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    USE_DESCRIPTOR_STORE: tl.constexpr,
    STORES_FIRST: tl.constexpr,
    INDEX: tl.constexpr,
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
    """One sequence or segment, value head and tile of V; the grid is ``N * HV * cdiv(V, BV)``.

    Packed rows have one more sequence: the tokens past the last, which are padding. Of split ones
    ``N`` are the places of segments.
    """
    tl.static_assert(BK >= K)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_hv = tl.program_id(0) // NV % HV
    i_n = tl.program_id(0) // (NV * HV)
    i_h = i_hv // (HV // H)
    if SEGMENTS > 1:
        i_s = i_n.to(tl.int64)
        chunks = segment_chunks(T, B, BT, SEGMENTS, LEAST)
        if not IS_VARLEN:
            i_n, i_segment = find_segment(i_n, T, chunks, BT)
    if IS_VARLEN:
        N = tl.num_programs(0) // (NV * HV) - 1
        if SEGMENTS > 1:
            N -= tl.cdiv(T, chunks * BT)
            i_n, i_segment = find_chunk(
                cu_seqlens, i_n, stride_cu_seqlens_n, N + 1, chunks * BT, BN
            )
    i_b = i_n.to(tl.int64)
    i_first = i_b * 0
    length = T
    is_live = True
    if IS_VARLEN:
        is_live = i_n < N
        i_start, length = load_bounds(cu_seqlens, i_n, stride_cu_seqlens_n, N, T)
        i_first = i_start.to(tl.int64)
        i_b = i_b * 0

    i_write = i_n.to(tl.int64)
    i_read = i_write
    if IS_POOL:
        i_row = tl.where(is_live, i_n, 0)
        if HAS_INDICES:
            i_write = tl.load(state_indices + i_row * stride_state_indices_n).to(tl.int64)
            i_read = i_write
        if HAS_READ_INDICES:
            i_read = tl.load(read_indices + i_row * stride_read_indices_n).to(tl.int64)
        is_live = is_live & (i_read > null_index) & (i_write > null_index) & (length > 0)
    i_place = i_b * tl.cdiv(T, BT)
    if IS_VARLEN:
        i_place = i_first // BT + i_n
    is_last = is_live
    i_own = 0
    if SEGMENTS > 1:
        # Places that are left over have no tokens, and are not the last.
        i_skip = i_segment * (chunks * BT)
        rest = length - i_skip
        is_last = is_live & (rest <= chunks * BT) & ((rest > 0) | (i_segment == 0))
        i_skip = tl.where(rest > 0, i_skip, 0)
        length = tl.minimum(tl.maximum(rest, 0), chunks * BT)
        if HAS_KEPT:
            # Before its own tokens those that its state is made of.
            is_early = all_forget(kept, T, B, chunks, HV, BT, FORGOTTEN, LOOK, BN)
            p_kept = kept + i_place * HV + i_hv
            i_begin = find_forgotten(p_kept, i_skip // BT, HV, FORGOTTEN, LOOK) * BT
            i_own = tl.where(is_early, i_skip - i_begin, 0)
            length += i_own
            i_skip -= i_own
            is_first = i_skip == 0
            if not HAS_SEGMENT_STATES:
                # One program walks all, or each its own.
                is_whole = (i_segment == 0) & (is_early == 0)
                is_last = is_live & (is_last & is_early | is_whole)
                length = tl.where(is_early, length, tl.where(is_whole, T, 0))
                i_skip = tl.where(is_early, i_skip, 0)
        i_first += i_skip
        i_place += i_skip // BT
    # No token of padding is valid.
    valid = tl.where(is_live, length, 0)

    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_state = (o_v < V)[:, None] & (o_k < K)[None, :]
    b_S = tl.zeros((BV, BK), tl.float32)
    if HAS_SEGMENT_STATES:
        m_read = is_live
        if HAS_KEPT:
            i_s = tl.where(is_early, i_s - i_segment, i_s)
            m_read &= is_first | (is_early == 0)
        p_state = segment_states + (i_s * HV + i_hv) * (V * K)
        p_state += o_v[:, None] * K + o_k[None, :]
        b_S = tl.load(p_state, m_state & m_read, 0.0)
    elif HAS_STATE:
        m_read = is_live
        if HAS_KEPT:
            m_read &= is_first
        if HAS_INITIAL_STATE:
            m_read &= tl.load(has_initial_state + i_row * stride_has_initial_state_n) != 0
        p_state = state + i_read * stride_state_n + i_hv * stride_state_h
        p_state += o_v[:, None] * stride_state_v + o_k[None, :] * stride_state_k
        b_S = tl.load(p_state, m_state & m_read, 0.0).to(tl.float32)

    p_q = q + i_b * stride_q_b + i_first * stride_q_t + i_h * stride_q_h
    p_k = k + i_b * stride_k_b + i_first * stride_k_t + i_h * stride_k_h
    p_v = v + i_b * stride_v_b + i_first * stride_v_t + i_hv * stride_v_h
    o_block = ((i_b * T + i_first) * HV + i_hv) * BT
    p_inverse = inverse + o_block
    p_weights = weights + o_block
    ROWS: tl.constexpr = 3 if USE_QK_L2NORM else 2
    p_decays = decays + (i_place * HV + i_hv) * (ROWS * BT)
    # A descriptor ends where the sequence ends: what is past it reads as zero, and is not written.
    rows = tl.maximum(length, 1)
    places = tl.cdiv(rows, BT) * BT
    if USE_DESCRIPTORS:
        d_q = tl.make_tensor_descriptor(p_q, [rows, K], [stride_q_t, 1], [BT, BK])
        d_k = tl.make_tensor_descriptor(p_k, [rows, K], [stride_k_t, 1], [BT, BK])
        d_v = tl.make_tensor_descriptor(p_v, [rows, V], [stride_v_t, 1], [BT, BV])
        d_inverse = tl.make_tensor_descriptor(p_inverse, [rows, BT], [HV * BT, 1], [BT, BT])
        d_weights = tl.make_tensor_descriptor(p_weights, [rows, BT], [HV * BT, 1], [BT, BT])
        d_decays = tl.make_tensor_descriptor(p_decays, [places * (HV * ROWS)], [1], [BT])
    if USE_DESCRIPTOR_STORE:
        # Tokens of an empty sequence may begin where no memory is, which no descriptor may name.
        p_o = o + i_b * stride_o_b + i_hv * stride_o_h
        p_o += tl.where(length > 0, i_first + i_own, 0) * stride_o_t
        d_o = tl.make_tensor_descriptor(p_o, [rows - i_own, V], [stride_o_t, 1], [BT, BV])

    if USE_DESCRIPTOR_STORE:
        b_o = tl.zeros((BV, BT), tl.float32)
        b_p = tl.zeros((BV, BT), tl.float32)
        b_rise = tl.zeros((BT,), tl.float32)
    # Read a chunk ahead: Triton does so only for what leads to the operands of a product.
    p_last = p_decays + (ROWS - 1) * BT
    b_next = tl.load(p_last, valid > 0, 0.0)
    for i_t in range(0, length, BT):
        o_t = i_t + o_i
        m_t = o_t < valid
        o_row = o_t.to(tl.int64)[:, None]
        # Past the end where no token is valid.
        i_row = tl.where(valid > 0, i_t, places)
        b_last = b_next
        p_last += HV * ROWS * BT
        b_next = tl.load(p_last, i_t + BT < valid, 0.0)

        # The order of loads and products is that which needs the fewest registers.
        if USE_DESCRIPTORS:
            b_k = d_k.load([i_row, 0])
            b_q = d_q.load([i_row, 0])
        else:
            m_k = m_t[:, None] & (o_k < K)[None, :]
            b_k = tl.load(p_k + o_row * stride_k_t + o_k[None, :] * stride_k_k, m_k, 0.0)
            b_q = tl.load(p_q + o_row * stride_q_t + o_k[None, :] * stride_q_k, m_k, 0.0)
        b_Sd = b_S.to(DOT)
        b_x = tl.dot(b_Sd, tl.trans(b_k).to(DOT), input_precision=PRECISION)
        if USE_DESCRIPTOR_STORE:
            # Before the first own chunk nothing is stored: past the end.
            i_before = tl.where(i_t > i_own, i_t - BT - i_own, places)
            if STORES_FIRST:
                b_out = late_output(b_o, b_rise, b_p, scale)
                d_o.store([i_before, i_v * BV], b_out.to(o.dtype.element_ty))
        if STORES_FIRST or not USE_DESCRIPTOR_STORE:
            b_o = tl.dot(b_Sd, tl.trans(b_q).to(DOT), input_precision=PRECISION)
        if USE_DESCRIPTORS:
            b_decay = d_decays.load([i_row * (HV * ROWS)])
            if USE_QK_L2NORM:
                b_ratio = d_decays.load([i_row * (HV * ROWS) + BT])
            b_v = d_v.load([i_row, i_v * BV])
            b_inverse = d_inverse.load([i_row, 0])
            b_weights = d_weights.load([i_row, 0])
        else:
            p_decay = p_decays + i_t * (HV * ROWS) + o_i
            b_decay = tl.load(p_decay, m_t, 0.0)
            if USE_QK_L2NORM:
                b_ratio = tl.load(p_decay + BT, m_t, 0.0)
            m_v = m_t[:, None] & (o_v < V)[None, :]
            b_v = tl.load(p_v + o_row * stride_v_t + o_v[None, :] * stride_v_v, m_v, 0.0)
            o_pair = o_row * (HV * BT) + o_i[None, :]
            b_inverse = tl.load(p_inverse + o_pair, m_t[:, None], 0.0)
            b_weights = tl.load(p_weights + o_pair, m_t[:, None], 0.0)
        b_decay = b_decay.to(tl.float32)
        if USE_DESCRIPTOR_STORE:
            if not STORES_FIRST:
                b_out = late_output(b_o, b_rise, b_p, scale)
                b_o = tl.dot(b_Sd, tl.trans(b_q).to(DOT), input_precision=PRECISION)
                d_o.store([i_before, i_v * BV], b_out.to(o.dtype.element_ty))
            b_rise = b_decay
        else:
            b_o *= b_decay[None, :]
        if USE_QK_L2NORM:
            # The decay of keys by way of that of queries, which would else not be read ahead.
            b_decay *= b_ratio.to(tl.float32)
        b_x = (tl.trans(b_v).to(tl.float32) - b_x * b_decay[None, :]).to(DOT)
        b_u = tl.dot(b_x, tl.trans(b_inverse).to(DOT), input_precision=PRECISION)
        if USE_DESCRIPTOR_STORE:
            b_p = tl.dot(b_x, tl.trans(b_weights).to(DOT), input_precision=PRECISION)
        else:
            b_o = tl.dot(b_x, tl.trans(b_weights).to(DOT), b_o, input_precision=PRECISION)
        b_S *= b_last.to(tl.float32)
        b_S = tl.dot(b_u.to(DOT), b_k.to(DOT), b_S, input_precision=PRECISION)
        if not USE_DESCRIPTOR_STORE:
            m_own = o_t < length
            if HAS_KEPT:
                m_own &= o_t >= i_own
            store_output(
                o,
                (i_b, (i_first.to(INDEX) + o_t)[:, None], i_hv, o_v[None, :]),
                (stride_o_b, stride_o_t, stride_o_h, stride_o_v),
                tl.trans(b_o * scale),
                m_own[:, None] & (o_v < V)[None, :],
            )
    if USE_DESCRIPTOR_STORE:
        b_out = late_output(b_o, b_rise, b_p, scale)
        i_before = tl.where(length > 0, places - BT - i_own, places)
        d_o.store([i_before, i_v * BV], b_out.to(o.dtype.element_ty))

    p_final = final_state + i_write * stride_final_state_n + i_hv * stride_final_state_h
    p_final += o_v[:, None] * stride_final_state_v + o_k[None, :] * stride_final_state_k
    tl.store(p_final, b_S.to(final_state.dtype.element_ty), m_state & is_last)
