"""Depthwise causal convolution: prefill, decode and verify in one kernel.

    h = [history | x] ;  y[t] = act(bias + sum_j weight[:, j] * h[t + j]) ;  state' = the last of h

A program has ``BT`` tokens of one sequence and ``BD`` channels. It loads all the inputs of its
tokens before it stores anything, so that many loads are under way at a time, ``BR`` tokens in one
tile: one where channels are contiguous (each input is then loaded once and kept for ``W`` tokens),
all ``BT`` where tokens are contiguous (each is loaded ``W`` times, along the tokens).

Only the program of a sequence's first tokens touches its state: it reads the history, and writes
the new state from that and from the last inputs, read once more. So no program reads what another
writes, also where the state is a pool that is updated in place. Packed rows get one more sequence:
the tokens of none, which are padding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .causal_conv1d_tiles import (
    causal_conv1d_config,
    load_taps,
    packed_tokens_of_program,
    tokens_of_program,
)
from .configs import cdiv, next_power_of_2
from .launch import launch, strides
from .output import store_output

AXES = {
    "x": "btd",
    "weight": "dw",
    "bias": "d",
    "state": "ndc",
    "final_state": "ndc",
    "state_indices": "n",
    "num_accepted_tokens": "n",
    "cu_seqlens": "n",
    "y": "btd",
}
SIZES = {"T": "x_t"}


@triton.jit
def silu(b_x):
    """``x * sigmoid(x)``; with ``exp2`` the compiler needs no instructions for denormals."""
    return b_x / (1.0 + tl.exp2(b_x * -1.4426950408889634))


@triton.jit
def load_history(p_h, o_r, m_d, stride_h, W: tl.constexpr):
    """Entries ``r .. r + BR - 1`` of h for each ``r`` below ``W - 1``, where they are history."""
    history: tl.tuple = ()
    for r in tl.static_range(W - 1):
        b_h = tl.load(p_h + (o_r + r) * stride_h, m_d & (o_r + r < W - 1), 0.0)
        history += (b_h.to(tl.float32),)
    return history


@triton.jit
def store_state(
    p_f,
    p_h,
    p_x,
    first,
    columns,
    m_d,
    stride_f,
    stride_h,
    stride_x,
    W: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BC: tl.constexpr,
):
    """Copy ``columns`` entries of h, from ``first`` on, to the state at ``p_f [1, BD]``."""
    o_c = tl.arange(0, BC)[:, None]
    m_c = m_d & (o_c < columns)
    o_h = first + o_c
    o_t = o_h - (W - 1)
    b_c = tl.load(p_x + o_t.to(tl.int64) * stride_x, m_c & (o_t >= 0), 0.0).to(tl.float32)
    if HAS_STATE:
        b_h = tl.load(p_h + o_h * stride_h, m_c & (o_t < 0), 0.0).to(tl.float32)
        b_c = tl.where(o_t < 0, b_h, b_c)
        # Where both are one pool, another thread may still have to read what this one overwrites.
        tl.debug_barrier()
    tl.store(p_f + o_c * stride_f, b_c.to(p_f.dtype.element_ty), m_c)


@triton.jit
def causal_conv1d_kernel(
    x,
    weight,
    bias,
    state,
    final_state,
    state_indices,
    num_accepted_tokens,
    cu_seqlens,
    y,
    stride_x_b,
    stride_x_t,
    stride_x_d,
    stride_weight_d,
    stride_weight_w,
    stride_bias_d,
    stride_state_n,
    stride_state_d,
    stride_state_c,
    stride_final_state_n,
    stride_final_state_d,
    stride_final_state_c,
    stride_state_indices_n,
    stride_num_accepted_tokens_n,
    stride_cu_seqlens_n,
    stride_y_b,
    stride_y_t,
    stride_y_d,
    T,
    null_index: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,  # tokens that a verify step can hold
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    IS_POOL: tl.constexpr,  # `final_state` is a pool with slots, else a row for each sequence
    HAS_INDICES: tl.constexpr,
    HAS_ACCEPTED: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    IS_SILU: tl.constexpr,
    IS_WEIGHT_DENSE: tl.constexpr,  # its strides are W and 1: four taps are one load
    BT: tl.constexpr,  # at least W - 1 where a sequence may have more than BT tokens
    BR: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,  # covers the columns of a state that are written
):
    tl.static_assert(BR == 1 or BR == BT)
    ND: tl.constexpr = (D + BD - 1) // BD
    i_p = tl.program_id(0) // ND
    i_d = (tl.program_id(0) % ND).to(tl.int64) * BD
    if IS_VARLEN:
        i_n, i_b, t_start, L, i_t, is_live = packed_tokens_of_program(
            i_p, tl.num_programs(0) // ND, cu_seqlens, stride_cu_seqlens_n, T, BT
        )
    else:
        i_n, i_b, t_start, L, i_t, is_live = tokens_of_program(i_p, T, BT)
    t_first = i_t * BT  # in the sequence
    o_d = tl.arange(0, BD)[None, :]
    m_d = i_d + o_d < D

    # Rows of the inputs from W - 1 before the first token on, and the taps: they wait for no slot.
    b_b = i_b.to(tl.int64)
    p_x = x + b_b * stride_x_b + t_start.to(tl.int64) * stride_x_t
    p_x += i_d * stride_x_d + o_d * stride_x_d
    p_r = p_x + t_first.to(tl.int64) * stride_x_t
    o_r = tl.arange(0, BR)[:, None]
    rows: tl.tuple = ()
    for r in tl.static_range(1 - W, BT // BR):
        o_t = t_first + (o_r + r)
        b_r = tl.load(p_r + (o_r + r) * stride_x_t, m_d & (o_t >= 0) & (o_t < L), 0.0)
        rows += (b_r,)
    if IS_WEIGHT_DENSE:
        taps = load_taps(weight + i_d * W, o_d, m_d, W, 1, W)
    else:
        p_w = weight + i_d * stride_weight_d
        taps = load_taps(p_w, o_d, m_d, stride_weight_d, stride_weight_w, W)
    b_bias = tl.zeros([1, BD], tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias + (i_d + o_d) * stride_bias_d, m_d, 0.0).to(tl.float32)

    # The slot, and its column that stands first in h. What is not live reads slot 0, masked.
    i_row = tl.where(is_live, i_n, 0)
    i_slot = i_row.to(tl.int64)
    i_column = 0
    if IS_POOL:
        if HAS_INDICES:
            i_slot = tl.load(state_indices + i_row * stride_state_indices_n).to(tl.int64)
        is_live = is_live & (i_slot > null_index)
        if HAS_ACCEPTED:
            p_a = num_accepted_tokens + i_row * stride_num_accepted_tokens_n
            i_column = tl.load(p_a).to(tl.int32) - 1
            is_live = is_live & (i_column >= 0) & (i_column < S) & (L <= S)
            i_column = tl.where(is_live, i_column, 0)
        i_slot = tl.where(is_live, i_slot, 0)

    history: tl.tuple = ()
    for _ in tl.static_range(W - 1):
        history += (tl.zeros([BR, BD], tl.float32),)
    p_h = None
    stride_h = 0
    if HAS_STATE:
        stride_h = stride_state_c
        p_h = state + i_slot * stride_state_n + i_column * stride_state_c
        p_h += i_d * stride_state_d + o_d * stride_state_d
        if i_t == 0:
            history = load_history(p_h, o_r, m_d & is_live, stride_h, W)

    for r in tl.static_range(BT // BR):
        b_y = tl.zeros([BR, BD], tl.float32) + b_bias
        for j in tl.static_range(W):
            b_h = rows[r + j].to(tl.float32)
            if HAS_STATE and r + j < W - 1:
                b_h = tl.where(t_first + o_r + (r + j) < W - 1, history[r + j], b_h)
            b_y += b_h * taps[j].to(tl.float32)
        if IS_SILU:
            b_y = silu(b_y)
        b_y = tl.where(is_live, b_y, 0.0)
        o_t = t_first + (o_r + r)
        store_output(
            y,
            (b_b, t_start + o_t.to(tl.int64), i_d + o_d),
            (stride_y_b, stride_y_t, stride_y_d),
            b_y,
            m_d & (o_t < L),
        )

    if i_t == 0:
        # Column j of the new state is entry `first + j` of h.
        first = L
        columns = W - 1
        if HAS_ACCEPTED:
            first = 1
            columns = W - 2 + L
        if IS_POOL:
            columns = tl.where(L > 0, columns, 0)
        p_f = final_state + i_slot * stride_final_state_n
        p_f += i_d * stride_final_state_d + o_d * stride_final_state_d
        store_state(
            p_f,
            p_h,
            p_x,
            first,
            tl.where(is_live, columns, 0),
            m_d,
            stride_final_state_c,
            stride_h,
            stride_x_t,
            W,
            HAS_STATE,
            BC,
        )


def supports(x: Tensor, *_: object, **__: object) -> str | None:
    """Why a call cannot be served, in words for its caller; None where it can."""
    if x.dtype == torch.float64:
        return "the kernels compute in float32; x is float64"
    return None


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    final_state: Tensor,
    state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    is_pool: bool,
    activation: str | None,
    null_index: int,
) -> Tensor:
    B, T, D = x.shape
    W = weight.shape[1]
    S = final_state.shape[2] - W + 2
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    is_verify = num_accepted_tokens is not None
    BT, BR, BD, num_warps = causal_conv1d_config(
        N,
        T,
        D,
        W,
        itemsize=x.dtype.itemsize,
        is_varlen=cu_seqlens is not None,
        is_channel_major=x.stride(1) == 1 and x.stride(2) != 1,
        has_wide_state=final_state.stride(1) != 1,
    )
    blocks = N * cdiv(T, BT) if cu_seqlens is None else T // BT + N + 1
    launch(
        causal_conv1d_kernel,
        blocks * cdiv(D, BD),
        (
            x,
            weight,
            bias,
            state,
            final_state,
            state_indices,
            num_accepted_tokens,
            cu_seqlens,
            y,
        ),
        (
            *x.stride(),
            *weight.stride(),
            *strides(bias, 1),
            *strides(state, 3),
            *final_state.stride(),
            *strides(state_indices, 1),
            *strides(num_accepted_tokens, 1),
            *strides(cu_seqlens, 1),
            *y.stride(),
            T,
        ),
        null_index=null_index,
        D=D,
        W=W,
        S=S,
        HAS_BIAS=bias is not None,
        HAS_STATE=state is not None,
        IS_POOL=is_pool,
        HAS_INDICES=state_indices is not None,
        HAS_ACCEPTED=is_verify,
        IS_VARLEN=cu_seqlens is not None,
        IS_SILU=activation == "silu",
        IS_WEIGHT_DENSE=weight.is_contiguous(),
        BT=BT,
        BR=BR,
        BD=BD,
        BC=next_power_of_2(final_state.shape[2] if is_verify else W - 1),
        num_warps=num_warps,
        num_stages=1,
    )
    return y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.gdn.causal_conv1d`` of checked arguments."""
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = x.dtype if initial_state is None else initial_state.dtype
    final_state = x.new_empty((N, x.shape[2], weight.shape[1] - 1), dtype=dtype)
    tensors = (x, weight, bias, initial_state, final_state, None, None, cu_seqlens)
    y = _launch(*tensors, is_pool=False, activation=activation, null_index=-1)
    return y, final_state


def causal_conv1d_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
    null_index: int = -1,
) -> Tensor:
    """``torch.ops.gdn.causal_conv1d_`` of checked arguments."""
    return _launch(
        x,
        weight,
        bias,
        state,
        state,
        state_indices,
        num_accepted_tokens,
        cu_seqlens,
        is_pool=True,
        activation=activation,
        null_index=null_index,
    )
