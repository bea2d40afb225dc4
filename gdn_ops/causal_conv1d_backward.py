"""Gradient of the causal convolution, and how autograd reaches it.

With ``z`` the preactivation and ``dz = dy * act'(z)``:

    dh[t + j] += weight[:, j] * dz[t]
    dweight[:, j] = sum_t dz[t] * h[t + j]
    dbias = sum_t dz[t]

and ``dh`` splits into the gradients of the initial state and of ``x``, as ``h = [initial_state |
x]`` does.

Source: checked by tests/test_causal_conv1d_gradients.py against float64 autograd of a loop over
tokens.
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import arithmetic_dtype, check_shape
from ._conv_math import (
    check_functional,
    load_history,
    pieces,
    preactivation,
    read_piece,
    state_bytes,
)
from ._library import register_gradient, register_operator
from ._sequences import Block, Bounds, as_index

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _check(
    dy: Tensor,
    dfinal_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> None:
    op = "causal_conv1d_backward"
    N = check_functional(op, x, weight, bias, initial_state, cu_seqlens, activation)
    check_shape(op, "dy", dy, "[B, T, D]", tuple(x.shape))
    shape = (N, x.shape[2], weight.shape[1] - 1)
    check_shape(op, "dfinal_state", dfinal_state, "[N, D, W - 1]", shape)


def _activation_gradient(z: Tensor, dy: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return dy
    s = torch.sigmoid(z)
    return dy * s * (1 + z * (1 - s))


def _reference(
    dy: Tensor,
    dfinal_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Gradients:
    _check(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, activation)
    dtype = arithmetic_dtype(x.dtype)
    bounds = Bounds.of(x, cu_seqlens)
    N, W = bounds.count, weight.shape[1]
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    taps = weight.to(dtype).mT.contiguous()  # [W, D]
    dtaps = torch.zeros_like(taps)
    dbias = dtaps.new_zeros(taps.shape[1])
    if initial_state is None:
        dinitial = x.new_empty(0)
    else:
        dinitial = dfinal_state.to(dtype, memory_format=torch.contiguous_format, copy=True)
    for block in bounds.blocks(x, state_bytes(x, W), range(N)):
        index = as_index(block.ids, x.device)
        history = load_history(initial_state, block, x, W)
        carry = dfinal_state[index].mT.to(dtype)  # gradient of the last W - 1 inputs
        carry = _backward_block(
            dy, x, block, history, carry, taps, bias, activation, (dx, dtaps, dbias)
        )
        if initial_state is not None:
            dinitial[index] = carry.mT
    return (
        dx,
        dtaps.mT.to(weight.dtype).contiguous(),
        x.new_empty(0) if bias is None else dbias.to(bias.dtype),
        dinitial if initial_state is None else dinitial.to(initial_state.dtype),
    )


def _backward_block(
    dy: Tensor,
    x: Tensor,
    block: Block,
    history: Tensor,
    carry: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    activation: str | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Add the gradients of a block to ``grads``; returns that of the inputs before it."""
    dx, dtaps, dbias = grads
    W = taps.shape[0]
    for t0, t1 in reversed(pieces(x, block)):
        h = _inputs_before(x, block, history, t0, t1, W)
        z = preactivation(h, taps, bias)
        dz = _activation_gradient(z, block.read(dy, t0, t1).to(z.dtype), activation)
        L = t1 - t0
        dh = torch.zeros_like(h)
        dh[:, L:] = carry
        for j in range(W):
            dh[:, j : j + L].addcmul_(dz, taps[j])
            dtaps[j] += (dz * h[:, j : j + L]).sum((0, 1))
        dbias += dz.sum((0, 1))
        block.write(dx, t0, t1, dh[:, W - 1 :])
        carry = dh[:, : W - 1]
    return carry


def _inputs_before(x: Tensor, block: Block, history: Tensor, t0: int, t1: int, W: int) -> Tensor:
    """``h`` of a piece: its tokens and the ``W - 1`` inputs before them."""
    start = max(0, t0 - W + 1)
    h = read_piece(x, block, history, start, t1)
    return h[:, h.shape[1] - (t1 - t0) - W + 1 :]


def _fake(
    dy: Tensor,
    dfinal_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Gradients:
    _check(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, activation)
    like = [x, weight, *(t if t is not None else x.new_empty(0) for t in (bias, initial_state))]
    out = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]
    return tuple(out)  # type: ignore[return-value]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.activation = keyword_only_inputs["activation"]


def _backward(ctx: Any, dy: Tensor, dfinal_state: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    grads = torch.ops.gdn.causal_conv1d_backward(
        dy, dfinal_state, *inputs, activation=ctx.activation
    )
    present = (grad if x is not None else None for grad, x in zip(grads, inputs, strict=False))
    return (*present, None)  # none for cu_seqlens


def register_backward() -> None:
    """Define ``torch.ops.gdn.causal_conv1d_backward``, the gradient of ``causal_conv1d``."""
    register_operator(
        "causal_conv1d_backward(Tensor dy, Tensor dfinal_state, Tensor x, Tensor weight, "
        "Tensor? bias=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, *, "
        "str? activation=None) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",
        _reference,
        _fake,
        kernels="causal_conv1d_backward",
    )
    register_gradient("causal_conv1d", _backward, _setup_context)
