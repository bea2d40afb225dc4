"""Gated delta rule token by token: decode, verify and short sequences in one kernel.

    S <- exp(g_t) S ;  u = beta_t (v_t - S k_t) ;  S <- S + u k_t^T ;  o_t = scale S q_t

A program has ``BV`` rows of the V-major state of one sequence and value head in registers. It reads
them once, walks the tokens of the sequence, and writes them once, or after each token into the
slots of a table. Packed rows get one more sequence: the tokens of none, which are padding.

Traffic of a decode step: the state read and written, ``2 * V * K`` numbers per value head; all else
is less than one percent of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import recurrent_verify
from .configs import cdiv, next_power_of_2, recurrent_tiles, verify_tiles
from .exact import exact_delta_step, exact_inverse_norm
from .input import load_input
from .launch import launch, strides
from .norm import inverse_norm
from .output import store_output

AXES = {
    "q": "bthk",
    "k": "bthk",
    "v": "bthv",
    "g": "bthk",
    "beta": "bth",
    "state": "nhvk",
    "final_state": "nhvk",
    "state_indices": "ns",
    "num_accepted_tokens": "n",
    "cu_seqlens": "n",
    "read_indices": "n",
    "o": "bthv",
}
SIZES = {"T": "q_t"}


@triton.jit
def delta_step(b_s, b_q, b_k, b_v, b_g, b_beta):
    """One token on a tile ``[BV, BK]`` of the state; ``b_g`` broadcasts to it."""
    b_s *= tl.exp(b_g)
    b_u = b_beta * (b_v - tl.sum(b_s * b_k[None, :], 1))
    b_s += b_u[:, None] * b_k[None, :]
    return b_s, tl.sum(b_s * b_q[None, :], 1)


@triton.jit
def recurrent_kernel(
    q,
    k,
    v,
    g,
    beta,
    state,
    final_state,
    state_indices,
    num_accepted_tokens,
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
    stride_g_b,
    stride_g_t,
    stride_g_h,
    stride_g_k,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    stride_state_n,
    stride_state_h,
    stride_state_v,
    stride_state_k,
    stride_final_state_n,
    stride_final_state_h,
    stride_final_state_v,
    stride_final_state_k,
    stride_state_indices_n,
    stride_state_indices_s,
    stride_num_accepted_tokens_n,
    stride_cu_seqlens_n,
    stride_read_indices_n,
    stride_o_b,
    stride_o_t,
    stride_o_h,
    stride_o_v,
    T,
    scale: tl.constexpr,
    null_index: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,  # columns of the table
    USE_QK_L2NORM: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_G_PER_KEY: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_STATE: tl.constexpr,
    IS_POOL: tl.constexpr,  # `final_state` is a pool with slots, else a row for each sequence
    HAS_INDICES: tl.constexpr,
    IS_TABLE: tl.constexpr,
    HAS_ACCEPTED: tl.constexpr,
    HAS_READ_INDICES: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    EXACT: tl.constexpr,  # a token's bits depend on nothing but its inputs and the state before it
    STREAM: tl.constexpr,  # states are written past the caches
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    MODIFIER: tl.constexpr = ".cs" if STREAM else ""
    i_p = tl.program_id(0)
    i_v = i_p % NV
    i_hv = (i_p // NV) % HV
    i_n = (i_p // NV) // HV
    i_h = i_hv // (HV // H)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_s = m_v[:, None] & m_k[None, :]

    # The tokens of the sequence.
    i_b = i_n.to(tl.int64)
    t_start = 0
    t_end = T
    is_live = True
    if IS_VARLEN:
        i_b = i_b * 0
        N = tl.num_programs(0) // (NV * HV) - 1
        is_live = i_n < N
        t_start = tl.minimum(tl.load(cu_seqlens + i_n * stride_cu_seqlens_n).to(tl.int32), T)
        i_next = tl.minimum(i_n + 1, N) * stride_cu_seqlens_n
        t_end = tl.where(is_live, tl.minimum(tl.load(cu_seqlens + i_next).to(tl.int32), T), T)
    L = t_end - t_start

    # The slots that it reads and writes; what is not live reads slot 0, masked.
    i_row = tl.where(is_live, i_n, 0)
    i_read = i_row.to(tl.int64)
    i_write = i_row.to(tl.int64)
    if IS_POOL:
        if HAS_INDICES:
            p_row = state_indices + i_row * stride_state_indices_n
            p_read = p_row
            if IS_TABLE:
                is_live = is_live & (L <= S)
            if HAS_ACCEPTED:
                i_column = tl.load(num_accepted_tokens + i_row * stride_num_accepted_tokens_n) - 1
                is_live = is_live & (i_column >= 0) & (i_column < S)
                p_read += tl.where(is_live, i_column, 0) * stride_state_indices_s
            i_read = tl.load(p_read).to(tl.int64)
            i_write = i_read
        if HAS_READ_INDICES:
            i_read = tl.load(read_indices + i_row * stride_read_indices_n).to(tl.int64)
        is_live = is_live & (i_read > null_index)
        if not IS_TABLE:
            is_live = is_live & (i_write > null_index) & (L > 0)
        i_read = tl.where(is_live, i_read, 0)
        i_write = tl.where(is_live, i_write, 0)

    b_s = tl.zeros([BV, BK], tl.float32)
    if HAS_STATE:
        p_s = state + i_read * stride_state_n + i_hv * stride_state_h
        p_s += o_v[:, None] * stride_state_v + o_k[None, :] * stride_state_k
        b_s = tl.load(p_s, m_s & is_live, 0.0).to(tl.float32)
    if BV > 4:
        # No load of a token comes before, nor what is computed from it: ptxas would put the norms
        # between the loads of the state. Of few rows all loads are early, and a token's earlier.
        tl.debug_barrier()
    p_f = final_state + i_hv * stride_final_state_h
    p_f += o_v[:, None] * stride_final_state_v + o_k[None, :] * stride_final_state_k

    p_q = q + i_b * stride_q_b + i_h * stride_q_h + o_k * stride_q_k
    p_k = k + i_b * stride_k_b + i_h * stride_k_h + o_k * stride_k_k
    p_v = v + i_b * stride_v_b + i_hv * stride_v_h + o_v * stride_v_v
    for i_t in range(t_start, t_end):
        b_q = tl.load(p_q + i_t * stride_q_t, m_k, 0.0).to(tl.float32)
        b_k = tl.load(p_k + i_t * stride_k_t, m_k, 0.0).to(tl.float32)
        b_v = tl.load(p_v + i_t * stride_v_t, m_v, 0.0).to(tl.float32)
        if USE_QK_L2NORM:
            if EXACT:
                b_q *= exact_inverse_norm(b_q, BK)
                b_k *= exact_inverse_norm(b_k, BK)
            else:
                b_q *= inverse_norm(b_q)
                b_k *= inverse_norm(b_k)
        b_g = 0.0
        if HAS_G_PER_KEY:
            p_g = g + i_b * stride_g_b + i_t * stride_g_t + i_hv * stride_g_h + o_k * stride_g_k
            b_g = tl.load(p_g, m_k, 0.0)[None, :]
        elif HAS_G:
            b_g = load_input(g, (i_b, i_t, i_hv), (stride_g_b, stride_g_t, stride_g_h), True)
        b_beta = 1.0
        if HAS_BETA:
            b_beta = load_input(
                beta, (i_b, i_t, i_hv), (stride_beta_b, stride_beta_t, stride_beta_h), True
            )
        if EXACT:
            b_s, b_o = exact_delta_step(b_s, b_q * scale, b_k, b_v, b_g, b_beta, BV, BK)
            b_s = b_s.to(final_state.dtype.element_ty).to(tl.float32)
        else:
            b_s, b_o = delta_step(b_s, b_q * scale, b_k, b_v, b_g, b_beta)
        b_o = tl.where(is_live, b_o, 0.0)
        store_output(
            o,
            (i_b, i_t, i_hv, o_v),
            (stride_o_b, stride_o_t, stride_o_h, stride_o_v),
            b_o,
            m_v,
        )
        if IS_TABLE:
            i_token = tl.minimum(i_t - t_start, S - 1)
            i_slot = tl.load(p_row + i_token * stride_state_indices_s).to(tl.int64)
            m_f = m_s & is_live & (i_slot > null_index)
            p_slot = p_f + tl.maximum(i_slot, 0) * stride_final_state_n
            b_f = b_s.to(final_state.dtype.element_ty)
            tl.store(p_slot, b_f, m_f, cache_modifier=MODIFIER)
    if not IS_TABLE:
        p_slot = p_f + i_write * stride_final_state_n
        b_f = b_s.to(final_state.dtype.element_ty)
        tl.store(p_slot, b_f, m_s & is_live, cache_modifier=MODIFIER)


def supports(q: Tensor, *_: object, **__: object) -> str | None:
    """Why a call cannot be served, in words for its caller; None where it can."""
    if q.dtype == torch.float64:
        return "the kernels compute in float32; q is float64"
    return None


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    final_state: Tensor,
    state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    cu_seqlens: Tensor | None,
    read_indices: Tensor | None,
    *,
    is_pool: bool,
    scale: float | None,
    use_qk_l2norm: bool,
    null_index: int = -1,
    exact: bool = False,
) -> Tensor:
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    N = B if cu_seqlens is None else cu_seqlens.shape[0]  # packed: one more, the tokens of none
    is_table = state_indices is not None and state_indices.dim() == 2
    size = final_state.dtype.itemsize
    tiles = recurrent_tiles(K, V, size, None if exact or is_table else N * HV)
    slots = (state_indices, num_accepted_tokens, cu_seqlens, read_indices)
    tensors = (q, k, v, g, beta, state, final_state, *slots, o)
    numbers = (
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *strides(g, 4),
        *strides(beta, 3),
        *strides(state, 4),
        *final_state.stride(),
        *strides(state_indices, 2),
        *strides(num_accepted_tokens, 1),
        *strides(cu_seqlens, 1),
        *strides(read_indices, 1),
        *o.stride(),
        T,
    )
    launch(
        recurrent_kernel,
        N * HV * cdiv(V, tiles.BV),
        tensors,
        numbers,
        tiles.num_warps,
        1,
        scale=K**-0.5 if scale is None else scale,
        null_index=null_index,
        H=H,
        HV=HV,
        K=K,
        V=V,
        S=state_indices.shape[1] if state_indices is not None and is_table else 1,
        USE_QK_L2NORM=use_qk_l2norm,
        HAS_G=g is not None,
        HAS_G_PER_KEY=g is not None and g.dim() == 4,
        HAS_BETA=beta is not None,
        HAS_STATE=state is not None,
        IS_POOL=is_pool,
        HAS_INDICES=state_indices is not None,
        IS_TABLE=is_table,
        HAS_ACCEPTED=num_accepted_tokens is not None,
        HAS_READ_INDICES=read_indices is not None,
        IS_VARLEN=cu_seqlens is not None,
        EXACT=exact,
        STREAM=tiles.stream,
        BK=next_power_of_2(K),
        BV=tiles.BV,
    )
    return o


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.gdn.recurrent`` of checked arguments."""
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    shape = (N, v.shape[2], v.shape[3], q.shape[3])
    final_state = torch.empty(shape, dtype=dtype, device=q.device)
    tensors = (q, k, v, g, beta, initial_state, final_state, None, None, cu_seqlens, None)
    o = _launch(*tensors, is_pool=False, scale=scale, use_qk_l2norm=use_qk_l2norm)
    return o, final_state


def recurrent_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    read_indices: Tensor | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    null_index: int = -1,
    exact: bool = False,
) -> Tensor:
    """``torch.ops.gdn.recurrent_`` of checked arguments."""
    is_table = state_indices is not None and state_indices.dim() == 2
    tiles = None
    if not (exact or is_table or (g is not None and g.dim() == 4)):
        rows = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
        tiles = verify_tiles(q.shape[3], q.shape[1], rows, state.dtype, q.dtype)
    if tiles is not None:
        return recurrent_verify.recurrent_(
            q,
            k,
            v,
            g,
            beta,
            state,
            state_indices,
            cu_seqlens,
            read_indices,
            tiles,
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
            null_index=null_index,
        )
    slots = (state_indices, num_accepted_tokens, cu_seqlens, read_indices)
    return _launch(
        *(q, k, v, g, beta, state, state),
        *slots,
        is_pool=True,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        null_index=null_index,
        exact=exact,
    )
