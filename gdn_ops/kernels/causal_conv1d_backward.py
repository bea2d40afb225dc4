"""Gradient of the causal convolution, deterministic.

    dz = dy * act'(z) ;  dh[t + j] += weight[:, j] * dz[t] ;  dweight[:, j] = sum_t dz[t] * h[t + j]

A program has ``BT`` tokens of one sequence and ``BD`` channels. It recomputes the preactivations of
its tokens and of the ``W - 1`` after them, whose gradients reach back, and loads ``BR`` tokens at a
time before it stores anything. ``dx`` lags ``W - 1`` tokens behind: what comes before the first is
the gradient of the initial state. The sums for ``dweight`` and ``dbias`` are a row of ``dtaps`` for
each program; the rows are added afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .causal_conv1d_tiles import (
    causal_conv1d_backward_config,
    load_taps,
    packed_tokens_of_program,
    tokens_of_program,
)
from .configs import cdiv
from .launch import launch, strides
from .output import store_output

AXES = {
    "dy": "btd",
    "dfinal_state": "ndc",
    "x": "btd",
    "weight": "dw",
    "bias": "d",
    "state": "ndc",
    "cu_seqlens": "n",
    "dtaps": "pwd",
    "dstate": "ndc",
    "dx": "btd",
}
SIZES = {"T": "x_t"}


@triton.jit
def load_inputs_before(
    p_x, p_h, t_first, L, m_d, stride_t, stride_h, W: tl.constexpr, HAS_STATE: tl.constexpr
):
    """The ``W - 1`` entries of h before token ``t_first``, a tuple of float32 tiles."""
    p_t = p_x + t_first.to(tl.int64) * stride_t
    rows: tl.tuple = ()
    for r in tl.static_range(1 - W, 0):
        m_t = m_d & (t_first + r >= 0) & (t_first + r < L)
        b_h = tl.load(p_t + r * stride_t, m_t, 0.0).to(tl.float32)
        if HAS_STATE:
            m_h = m_d & (t_first + r < 0)
            b_h += tl.load(p_h + (t_first + W - 1 + r) * stride_h, m_h, 0.0).to(tl.float32)
        rows += (b_h,)
    return rows


@triton.jit
def load_tokens(p_x, t_first, L, m_d, stride_t, BR: tl.constexpr):
    """The ``BR`` tokens from ``t_first`` on, zero after the last, a tuple of tiles."""
    p_t = p_x + t_first.to(tl.int64) * stride_t
    rows: tl.tuple = ()
    for r in tl.static_range(BR):
        rows += (tl.load(p_t + r * stride_t, m_d & (t_first + r < L), 0.0),)
    return rows


@triton.jit
def silu_gradient(b_z):
    """The derivative of ``z * sigmoid(z)``."""
    b_s = 1.0 / (1.0 + tl.exp2(b_z * -1.4426950408889634))
    return b_s * (1.0 + b_z * (1.0 - b_s))


@triton.jit
def causal_conv1d_backward_kernel(
    dy,
    dfinal_state,
    x,
    weight,
    bias,
    state,
    cu_seqlens,
    dtaps,
    dstate,
    dx,
    stride_dy_b,
    stride_dy_t,
    stride_dy_d,
    stride_dfinal_state_n,
    stride_dfinal_state_d,
    stride_dfinal_state_c,
    stride_x_b,
    stride_x_t,
    stride_x_d,
    stride_weight_d,
    stride_weight_w,
    stride_bias_d,
    stride_state_n,
    stride_state_d,
    stride_state_c,
    stride_cu_seqlens_n,
    stride_dtaps_p,
    stride_dtaps_w,
    stride_dtaps_d,
    stride_dstate_n,
    stride_dstate_d,
    stride_dstate_c,
    stride_dx_b,
    stride_dx_t,
    stride_dx_d,
    T,
    D: tl.constexpr,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    IS_SILU: tl.constexpr,
    IS_WEIGHT_DENSE: tl.constexpr,  # its strides are W and 1: four taps are one load
    BT: tl.constexpr,
    BR: tl.constexpr,  # at least W - 1, divides BT + W - 1
    BD: tl.constexpr,
):
    tl.static_assert(BR >= W - 1 and (BT + W - 1) % BR == 0)
    ND: tl.constexpr = (D + BD - 1) // BD
    i_p = tl.program_id(0) // ND
    i_d = (tl.program_id(0) % ND).to(tl.int64) * BD
    if IS_VARLEN:
        i_n, i_b, t_start, L, i_t, is_live = packed_tokens_of_program(
            i_p, tl.num_programs(0) // ND, cu_seqlens, stride_cu_seqlens_n, T, BT
        )
    else:
        i_n, i_b, t_start, L, i_t, is_live = tokens_of_program(i_p, T, BT)
    o_d = tl.arange(0, BD)[None, :]
    m_d = i_d + o_d < D
    m_live = m_d & is_live
    b_b = i_b.to(tl.int64)
    b_start = t_start.to(tl.int64)
    i_row = tl.where(is_live, i_n, 0).to(tl.int64)

    if IS_WEIGHT_DENSE:
        weights = load_taps(weight + i_d * W, o_d, m_d, W, 1, W)
    else:
        p_w = weight + i_d * stride_weight_d
        weights = load_taps(p_w, o_d, m_d, stride_weight_d, stride_weight_w, W)
    taps: tl.tuple = ()
    dweights: tl.tuple = ()
    dz: tl.tuple = ()  # of the last W - 1 tokens
    for j in tl.static_range(W):
        taps += (weights[j].to(tl.float32),)
        dweights += (tl.zeros([1, BD], tl.float32),)
        if j > 0:
            dz += (tl.zeros([1, BD], tl.float32),)
    b_bias = tl.zeros([1, BD], tl.float32)
    b_dbias = tl.zeros([1, BD], tl.float32)
    if HAS_BIAS:
        b_bias += tl.load(bias + (i_d + o_d) * stride_bias_d, m_d, 0.0).to(tl.float32)

    p_x = x + b_b * stride_x_b + b_start * stride_x_t + i_d * stride_x_d + o_d * stride_x_d
    p_dy = dy + b_b * stride_dy_b + b_start * stride_dy_t + i_d * stride_dy_d + o_d * stride_dy_d
    p_df = dfinal_state + i_row * stride_dfinal_state_n
    p_df += i_d * stride_dfinal_state_d + o_d * stride_dfinal_state_d
    p_h = None
    stride_h = 0
    if HAS_STATE:
        stride_h = stride_state_c
        p_h = state + i_row * stride_state_n + i_d * stride_state_d + o_d * stride_state_d

    p_dh = None
    if HAS_STATE:
        p_dh = dstate + i_row * stride_dstate_n + i_d * stride_dstate_d + o_d * stride_dstate_d

    t_first = i_t * BT
    rows = load_inputs_before(p_x, p_h, t_first, L, m_live, stride_x_t, stride_h, W, HAS_STATE)
    for i in range(0, tl.minimum(L - t_first, BT) + W - 1, BR):
        t = t_first + i
        h = rows + load_tokens(p_x, t, L, m_live, stride_x_t, BR)
        dy_rows = load_tokens(p_dy, t, L, m_live, stride_dy_t, BR)
        for r in tl.static_range(BR):
            b_dz = dy_rows[r].to(tl.float32)
            if IS_SILU:
                b_z = b_bias
                for j in tl.static_range(W):
                    b_z += h[r + j].to(tl.float32) * taps[j]
                b_dz *= silu_gradient(b_z)
            dz += (b_dz,)
            # The last W - 1 tokens are the next program's too, and count there.
            b_own = b_dz
            if r > BR - W:
                b_own = tl.where(i + r < BT, b_dz, 0.0)
            b_dbias += b_own
            sums: tl.tuple = ()
            for j in tl.static_range(W):
                sums += (dweights[j] + b_own * h[r + j].to(tl.float32),)
            dweights = sums

            t_h = t + (r - (W - 1))
            b_dh = tl.zeros([1, BD], tl.float32)
            for j in tl.static_range(W):
                b_dh += taps[j] * dz[r + W - 1 - j]
            # The last of h are the final state too.
            if (t_h >= L - (W - 1)) & (t_h < L):
                p_c = p_df + (t_h - L + (W - 1)) * stride_dfinal_state_c
                b_dh += tl.load(p_c, m_live, 0.0).to(tl.float32)
            if HAS_STATE and r < W - 1:
                p_c = p_dh + (t_h + (W - 1)) * stride_dstate_c
                tl.store(p_c, b_dh.to(dstate.dtype.element_ty), m_live & (t_h < 0))
            m_t = (t_h < L) & (t_h >= t_first)
            store_output(
                dx,
                (b_b, b_start + t_h, i_d + o_d),
                (stride_dx_b, stride_dx_t, stride_dx_d),
                b_dh,
                m_d & m_t,
            )
        last: tl.tuple = ()
        for r in tl.static_range(BR, BR + W - 1):
            last += (h[r].to(tl.float32),)
        rows = last
        dz = dz[BR:]

    p_s = dtaps + i_p.to(tl.int64) * stride_dtaps_p + (i_d + o_d) * stride_dtaps_d
    for j in tl.static_range(W):
        tl.store(p_s + j * stride_dtaps_w, dweights[j], m_d)
    tl.store(p_s + W * stride_dtaps_w, b_dbias, m_d)


def supports(dy: Tensor, dfinal_state: Tensor, x: Tensor, *_: object, **__: object) -> str | None:
    """Why a call cannot be served, in words for its caller; None where it can."""
    if x.dtype == torch.float64:
        return "the kernels compute in float32; x is float64"
    return None


def _channels_innermost(x: Tensor) -> Tensor:
    """The kernel reads whole rows of channels: with other strides a copy is cheaper."""
    return x if x.stride(2) == 1 else x.contiguous()


def causal_conv1d_backward(
    dy: Tensor,
    dfinal_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``torch.ops.gdn.causal_conv1d_backward`` of checked arguments."""
    B, T, D = x.shape
    W = weight.shape[1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    x, dy = _channels_innermost(x), _channels_innermost(dy)
    is_varlen = cu_seqlens is not None
    BT, BR, BD, num_warps = causal_conv1d_backward_config(
        N, T, D, W, itemsize=x.dtype.itemsize, is_varlen=is_varlen
    )
    blocks = T // BT + N + 1 if is_varlen else N * cdiv(T, BT)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dtaps = x.new_empty((blocks, W + 1, D), dtype=torch.float32)
    dstate = None
    if initial_state is not None:
        dstate = initial_state.new_empty(initial_state.shape)
    launch(
        causal_conv1d_backward_kernel,
        blocks * cdiv(D, BD),
        (
            dy,
            dfinal_state,
            x,
            weight,
            bias,
            initial_state,
            cu_seqlens,
            dtaps,
            dstate,
            dx,
        ),
        (
            *dy.stride(),
            *dfinal_state.stride(),
            *x.stride(),
            *weight.stride(),
            *strides(bias, 1),
            *strides(initial_state, 3),
            *strides(cu_seqlens, 1),
            *dtaps.stride(),
            *strides(dstate, 3),
            *dx.stride(),
            T,
        ),
        D=D,
        W=W,
        HAS_BIAS=bias is not None,
        HAS_STATE=initial_state is not None,
        IS_VARLEN=is_varlen,
        IS_SILU=activation == "silu",
        IS_WEIGHT_DENSE=weight.is_contiguous(),
        BT=BT,
        BR=BR,
        BD=BD,
        num_warps=num_warps,
        num_stages=1,
    )
    sums = dtaps.sum(0)  # [W + 1, D]
    dweight = sums[:W].mT.to(weight.dtype).contiguous()
    dbias = x.new_empty(0) if bias is None else sums[W].to(bias.dtype)
    return dx, dweight, dbias, x.new_empty(0) if dstate is None else dstate
