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
def tokens_of_program(
    i_p,
    programs,
    cu_seqlens,
    stride_cu_seqlens_n,
    T,
    IS_VARLEN: tl.constexpr,
    BT: tl.constexpr,
):
    """Sequence, batch row, first token and length of it, block within it; and whether it is one.

    Sequence ``n`` of packed rows has the programs from ``cu_seqlens[n] // BT + n`` on, at least as
    many as it has blocks, so that ``T // BT + N + 1`` programs suffice for any bounds.
    """
    if IS_VARLEN:
        N = programs - T // BT - 1
        i_n = -1
        for i in range(0, N + 1, 128):
            o_n = i + tl.arange(0, 128)
            m_n = o_n <= N
            b_n = tl.load(cu_seqlens + o_n * stride_cu_seqlens_n, m_n, 0).to(tl.int32)
            i_n += tl.sum((m_n & (b_n // BT + o_n <= i_p)).to(tl.int32), 0)
        is_live = i_n < N
        p_n = cu_seqlens + i_n * stride_cu_seqlens_n
        t_start = tl.minimum(tl.load(p_n).to(tl.int32), T)
        t_end = tl.minimum(tl.load(p_n + stride_cu_seqlens_n, is_live, T).to(tl.int32), T)
        i_b = i_n * 0
        i_t = i_p - t_start // BT - i_n
        L = t_end - t_start
    else:
        NT = (T + BT - 1) // BT
        i_n = i_p // NT
        i_b = i_n
        i_t = i_p % NT
        t_start = 0
        L = T
        is_live = True
    return i_n, i_b, t_start, L, i_t, is_live


@triton.jit
def load_taps(weight, o_d, m_d, stride_weight_d, stride_weight_w, W: tl.constexpr):
    """The ``W`` taps of channels ``o_d [1, BD]``, a tuple of tiles like it."""
    if W == 4:
        # One load of all four: tap by tap, the lanes would read with gaps between them.
        o_w = tl.arange(0, 4)
        p_w = weight + tl.trans(o_d) * stride_weight_d + o_w[None, :] * stride_weight_w
        b_w = tl.load(p_w, tl.trans(m_d), 0.0)
        b_even, b_odd = tl.split(tl.reshape(b_w, (o_d.shape[1], 2, 2)))
        b_0, b_2 = tl.split(b_even)
        b_1, b_3 = tl.split(b_odd)
        taps = (b_0[None, :], b_1[None, :], b_2[None, :], b_3[None, :])
    else:
        taps = ()
        for j in tl.static_range(W):
            p_w = weight + o_d * stride_weight_d + j * stride_weight_w
            taps = taps + (tl.load(p_w, m_d, 0.0),)
    return taps


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
    BT: tl.constexpr,  # at least W - 1 where a sequence may have more than BT tokens
    BR: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,  # covers the columns of a state that are written
):
    tl.static_assert(BR == 1 or BR == BT)
    ND: tl.constexpr = (D + BD - 1) // BD
    i_p = tl.program_id(0) // ND
    i_d = (tl.program_id(0) % ND).to(tl.int64) * BD
    i_n, i_b, t_start, L, i_t, is_live = tokens_of_program(
        i_p, tl.num_programs(0) // ND, cu_seqlens, stride_cu_seqlens_n, T, IS_VARLEN, BT
    )
    t_first = i_t * BT  # in the sequence
    o_d = tl.arange(0, BD)[None, :]
    m_d = i_d + o_d < D

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
    m_live = m_d & is_live

    b_b = i_b.to(tl.int64)
    p_x = x + b_b * stride_x_b + t_start.to(tl.int64) * stride_x_t
    p_x += i_d * stride_x_d + o_d * stride_x_d
    p_h = None
    if HAS_STATE:
        p_h = state + i_slot * stride_state_n + i_column * stride_state_c
        p_h += i_d * stride_state_d + o_d * stride_state_d

    # Rows of h from W - 1 before the first token on.
    o_r = tl.arange(0, BR)[:, None]
    p_r = p_x + t_first.to(tl.int64) * stride_x_t
    rows = ()
    for r in tl.static_range(BT // BR - 1 + W):
        o_t = t_first + (o_r + (r - W + 1))
        b_r = tl.load(p_r + (o_r + (r - W + 1)) * stride_x_t, m_live & (o_t >= 0) & (o_t < L), 0.0)
        if HAS_STATE and r < W - 1:
            b_h = tl.load(p_h + (o_t + (W - 1)) * stride_state_c, m_live & (o_t < 0), 0.0)
            b_r = tl.where(o_t < 0, b_h.to(tl.float32), b_r.to(tl.float32))
        rows = rows + (b_r,)

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
            stride_state_c,
            stride_x_t,
            W,
            HAS_STATE,
            BC,
        )

    taps = load_taps(
        weight + i_d * stride_weight_d, o_d, m_d, stride_weight_d, stride_weight_w, W
    )
    b_bias = tl.zeros([1, BD], tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias + (i_d + o_d) * stride_bias_d, m_d, 0.0).to(tl.float32)
    for r in tl.static_range(BT // BR):
        b_y = tl.zeros([BR, BD], tl.float32) + b_bias
        for j in tl.static_range(W):
            b_y += rows[r + j].to(tl.float32) * taps[j].to(tl.float32)
        if IS_SILU:
            b_y = b_y / (1.0 + tl.exp(-b_y))
        b_y = tl.where(is_live, b_y, 0.0)
        o_t = t_first + (o_r + r)
        store_output(
            y,
            (b_b, t_start + o_t.to(tl.int64), i_d + o_d),
            (stride_y_b, stride_y_t, stride_y_d),
            b_y,
            m_d & (o_t < L),
        )


def causal_conv1d_config(
    N: int, T: int, D: int, W: int, *, itemsize: int, is_varlen: bool, is_channel_major: bool
) -> tuple[int, int, int, int]:
    """``BT``, ``BR``, ``BD`` and warps. ``T`` tokens are those of ``N`` sequences where packed.

    A lane moves 16 bytes at a time, and one warp is a program. With fewer programs than would give
    each multiprocessor some, tiles get narrower.
    """
    L = triton.cdiv(T, N) if is_varlen else T
    least = triton.next_power_of_2(W - 1) if is_varlen or T > 16 else 1
    if is_channel_major and L >= 16:
        BT = max(32, least)
        return BT, BT, 32, 2
    BT = max(min(triton.next_power_of_2(L), 16), least)
    BD = min(512 // itemsize, triton.next_power_of_2(D))
    while BD > 64 and N * triton.cdiv(L, BT) * triton.cdiv(D, BD) < 512:
        BD //= 2
    return BT, 1, BD, 1


def supports(x: Tensor, *_: object, **__: object) -> str | None:
    """Why a call cannot be served, in words for its caller; None where it can."""
    if x.dtype == torch.float64:
        return "the kernels compute in float32; x is float64"
    return None


def _strides(x: Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides of a tensor, zero where there is none."""
    return (0,) * rank if x is None else x.stride()


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
    )
    blocks = N * triton.cdiv(T, BT) if cu_seqlens is None else T // BT + N + 1
    causal_conv1d_kernel[(blocks * triton.cdiv(D, BD),)](
        x,
        weight,
        bias,
        state,
        final_state,
        state_indices,
        num_accepted_tokens,
        cu_seqlens,
        y,
        *x.stride(),
        *weight.stride(),
        *_strides(bias, 1),
        *_strides(state, 3),
        *final_state.stride(),
        *_strides(state_indices, 1),
        *_strides(num_accepted_tokens, 1),
        *_strides(cu_seqlens, 1),
        *y.stride(),
        T,
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
        BT=BT,
        BR=BR,
        BD=BD,
        BC=triton.next_power_of_2(final_state.shape[2] if is_verify else W - 1),
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
    slots = (state_indices, num_accepted_tokens, cu_seqlens)
    options = {"activation": activation, "null_index": null_index}
    return _launch(x, weight, bias, state, state, *slots, is_pool=True, **options)
