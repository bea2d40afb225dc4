"""Short depthwise causal convolution over time, with the state that decode carries.

    h = [state | x]                                     the last W - 1 inputs, then the new ones
    y[t] = act(bias + sum_j weight[:, j] * h[t + j])    j = 0 .. W-1
    state' = the last W - 1 of h

Source: the convolution before Gated DeltaNet in Qwen3-Next (Hugging Face transformers 5.23,
``causal_conv1d_fn`` and ``causal_conv1d_update``); checked by tests/test_causal_conv1d.py.
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import (
    arithmetic_dtype,
    check_index,
    check_null_index,
    check_pool,
    check_rank,
    check_slots,
    holds,
    state_dtypes,
)
from ._conv_math import (
    check_convolution,
    check_functional,
    convolve,
    last_inputs,
    load_history,
    state_bytes,
)
from ._library import refuse_gradient, register_operator
from ._sequences import Bounds, as_index, new_output
from ._slots import check_bounds, resolve_slots
from .causal_conv1d_backward import register_backward


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over whole sequences.

        h = [initial_state | x]
        y[t] = act(bias + sum_j weight[:, j] * h[t + j])

    Differentiable in its four tensors; the arithmetic is float32, rounded once.

    Args:
        x: Inputs, token-major, ``[B, T, D]``, float32, bfloat16 or float16; any strides.
        weight: ``[D, W]``, ``W >= 2``, dtype of ``x`` or float32.
        bias: ``[D]``, dtype of ``x`` or float32. Default: none.
        initial_state: The ``W - 1`` inputs before the first, oldest first, ``[N, D, W - 1]``,
            float32, bfloat16 or float16. Default: zeros.
        cu_seqlens: Bounds of packed sequences, ``[N + 1]``, int32 or int64; ``B`` must be 1.
            Default: each row of the batch is a sequence, ``N = B``.
        activation: ``"silu"`` or None. Default: None.

    Returns:
        y: ``[B, T, D]``, dtype of ``x``, contiguous. Rows past ``cu_seqlens[-1]`` are zero.
        final_state: ``[N, D, W - 1]``, dtype of ``initial_state``, else of ``x``; a new tensor.

    Raises:
        ValueError: a shape, dtype or device breaks the table in ``gdn_ops/README.md``.

    Source: Hugging Face transformers 5.23, ``causal_conv1d_fn``; tests/test_causal_conv1d.py.
    """
    y, final_state = torch.ops.gdn.causal_conv1d(
        x, weight, bias, initial_state, cu_seqlens, activation=activation
    )
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
    """Depthwise causal convolution on a pool of states that is updated in place: decode, prefill,
    verify.

    Without accepted counts, ``C = pool[state_indices[n]]`` holds the last ``W - 1`` inputs in its
    columns ``0 .. W-2``, and does so again afterwards; further columns are not touched. With
    accepted counts ``acc``, the pool has ``W - 1 + S - 1`` columns and keeps the inputs of every
    token of a verify step, ``L <= S``:

        h = [C[acc-1 .. acc+W-3] | x]
        y[t] = act(bias + sum_j weight[:, j] * h[t + j])
        C'[j] = C[acc + j]  for  0 <= j < W-2 ;     C'[W-2+t] = x[t]  for  t < L

    A row whose slot is ``<= null_index``, whose accepted count is outside ``1 .. S``, or which has
    more than ``S`` tokens in a verify step is padding: it reads and writes no state and its output
    is zero. A sequence of length 0 leaves its slot bitwise unchanged.

    Args:
        x: Inputs, token-major, ``[B, T, D]``, float32, bfloat16 or float16; any strides.
        weight: ``[D, W]``, ``W >= 2``, dtype of ``x`` or float32.
        bias: ``[D]``, dtype of ``x`` or float32, or None.
        state: The pool, ``[slots, D, W - 1 + S - 1]``, ``S >= 1``, float32, bfloat16 or float16;
            any strides; written.
        state_indices: Slot of each sequence, ``[N]``, int32 or int64. Default: slot ``n``.
        num_accepted_tokens: Tokens accepted in the previous step, the bonus token included,
            ``[N]``, int32 or int64, in ``1 .. S``. Default: a plain update.
        cu_seqlens: Bounds of packed sequences, ``[N + 1]``; ``B`` must be 1. Default: ``N = B``.
        activation: ``"silu"`` or None. Default: None.
        null_index: Slots up to this one are no slots, ``>= -1``. Default: -1.

    Returns:
        y: ``[B, T, D]``, dtype of ``x``, contiguous; zero in padding rows and past
            ``cu_seqlens[-1]``.

    Raises:
        ValueError: a shape, dtype or device breaks the table in ``gdn_ops/README.md``; on a CPU
            also a slot outside the pool; with ``GDN_DEBUG=1`` also two live rows on one slot and
            wrong bounds.
        NotImplementedError: an input requires a gradient.

    Source: docs/semantics.md, multi-token update; tests/test_causal_conv1d_pools.py.
    """
    refuse_gradient("causal_conv1d_", "causal_conv1d", x, weight, bias, state)
    y: Tensor = torch.ops.gdn.causal_conv1d_(
        x,
        weight,
        bias,
        state,
        state_indices,
        num_accepted_tokens,
        cu_seqlens,
        activation=activation,
        null_index=null_index,
    )
    return y


def _new_final_state(x: Tensor, weight: Tensor, initial_state: Tensor | None, N: int) -> Tensor:
    dtype = x.dtype if initial_state is None else initial_state.dtype
    return x.new_empty((N, x.shape[2], weight.shape[1] - 1), dtype=dtype)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    op = "causal_conv1d"
    N = check_functional(op, x, weight, bias, initial_state, cu_seqlens, activation)
    check_bounds(op, cu_seqlens, x.shape[1])
    bounds = Bounds.of(x, cu_seqlens)
    y = new_output(x, bounds, range(N))
    final = _new_final_state(x, weight, initial_state, N)
    for n in (n for n, length in enumerate(bounds.lengths) if length == 0):
        final[n] = 0 if initial_state is None else initial_state[n]
    W = weight.shape[1]
    for block in bounds.blocks(x, state_bytes(x, W), range(N)):
        history = load_history(initial_state, block, x, W)
        convolve(x, y, block, history, weight, bias, activation)
        recent = last_inputs(x, block, history, W - 1)
        final[as_index(block.ids, x.device)] = recent.mT.to(final.dtype)
    return y, final


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    N = check_functional("causal_conv1d", x, weight, bias, initial_state, cu_seqlens, activation)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, _new_final_state(x, weight, initial_state, N)


def _check_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    null_index: int,
) -> None:
    op = "causal_conv1d_"
    N = check_convolution(op, x, weight, bias, cu_seqlens, activation)
    D, W = weight.shape
    symbols = "[slots, D, W - 1 + S - 1]"
    check_rank(op, "state", state, symbols)
    columns = state.shape[2]
    check_pool(op, state, x, "x", symbols, (D, columns), state_dtypes(x.dtype))
    if holds(columns < W - 1):
        raise ValueError(f"{op}: state must have at least W - 1 = {W - 1} columns, got {columns}")
    if state_indices is not None:
        check_index(op, "state_indices", state_indices, "[N]", (N,))
    check_slots(op, state, state_indices, N, {"num_accepted_tokens": num_accepted_tokens})
    check_null_index(op, null_index)
    S = columns - W + 2
    if num_accepted_tokens is not None and cu_seqlens is None and holds(x.shape[1] > S):
        raise ValueError(
            f"{op}: x must have T <= S = {S} tokens with num_accepted_tokens, got {x.shape[1]}"
        )


def _reference_(
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
    op = "causal_conv1d_"
    slots = (state, state_indices, num_accepted_tokens, cu_seqlens, activation, null_index)
    _check_(x, weight, bias, *slots)
    check_bounds(op, cu_seqlens, x.shape[1])
    bounds = Bounds.of(x, cu_seqlens)
    W = weight.shape[1]
    accepted = None if num_accepted_tokens is None else num_accepted_tokens.tolist()
    rows = resolve_slots(op, bounds, state.shape[0], state_indices, null_index=null_index)
    live = rows.live
    if accepted is not None:
        S = state.shape[2] - W + 2
        live = [n for n in live if 1 <= accepted[n] <= S and bounds.lengths[n] <= S]
    y = new_output(x, bounds, live)
    for block in bounds.blocks(x, state_bytes(x, W), live):
        index = as_index([rows.read[n] for n in block.ids], x.device)
        pool_rows = state[index].mT  # [n, columns, D]
        if accepted is None:
            history, kept = pool_rows[:, : W - 1], W - 1
        else:
            first = torch.tensor([accepted[n] - 1 for n in block.ids], device=x.device)
            columns = first[:, None] + torch.arange(W - 1, device=x.device)
            history = pool_rows.take_along_dim(columns[..., None], 1)
            kept = W - 2 + block.length
        history = history.to(arithmetic_dtype(x.dtype))
        convolve(x, y, block, history, weight, bias, activation)
        recent = last_inputs(x, block, history, kept)  # reads the pool before it is written
        state[index, :, :kept] = recent.mT.to(state.dtype)
    return y


def _fake_(
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
    slots = (state, state_indices, num_accepted_tokens, cu_seqlens, activation, null_index)
    _check_(x, weight, bias, *slots)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check_data(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> None:
    check_bounds("causal_conv1d", cu_seqlens, x.shape[1])


def _check_data_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    null_index: int = -1,
    **_: Any,
) -> None:
    op = "causal_conv1d_"
    check_bounds(op, cu_seqlens, x.shape[1])
    bounds = Bounds.of(x, cu_seqlens)
    resolve_slots(op, bounds, state.shape[0], state_indices, null_index=null_index)


register_operator(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None, "
    "Tensor? cu_seqlens=None, *, str? activation=None) -> (Tensor y, Tensor final_state)",
    _reference,
    _fake,
    kernels="causal_conv1d",
    check_data=_check_data,
)
register_backward()
register_operator(
    "causal_conv1d_(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, "
    "Tensor? state_indices=None, Tensor? num_accepted_tokens=None, Tensor? cu_seqlens=None, *, "
    "str? activation=None, int null_index=-1) -> Tensor",
    _reference_,
    _fake_,
    kernels="causal_conv1d",
    check_data=_check_data_,
)
