"""The functions that stand in for those of transformers' model code.

    torch_chunk_gated_delta_rule        torch.ops.gdn.chunk, chunk_ where a cache holds the state
    torch_recurrent_gated_delta_rule    torch.ops.gdn.recurrent_
    causal_conv1d_fn                    torch.ops.gdn.causal_conv1d
    causal_conv1d_update                torch.ops.gdn.causal_conv1d_

Names, order and defaults of the arguments are those of the model code. The state in a cache keeps
the shape that transformers gives it, ``[B, HV, K, V]``, but its memory is V-major:
``state.transpose(-1, -2)`` is a contiguous ``[B, HV, V, K]``, which the operators update in place.
So a cache may be filled with these functions and used without them, or the other way round; one
that is not V-major is served by the functional operators and copied at each step.

Source: transformers 5.15 to 5.24, ``models/qwen3_next/modeling_qwen3_next.py``; checked by
tests/test_transformers.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gdn_ops  # noqa: F401 it registers the operators
from gdn_ops._checks import arithmetic_dtype
from gdn_ops.integrations.transformers.slot_state import SlotInputs, SlotState

# Themselves, not the functions around them: torch.compile guards the code and the defaults of each
# function that it sees through, at every call of what it compiled.
_CHUNK = (torch.ops.gdn.chunk.default, torch.ops.gdn.chunk_.default)
_RECURRENT = (torch.ops.gdn.recurrent.default, torch.ops.gdn.recurrent_.default)
_CONVOLVE = torch.ops.gdn.causal_conv1d.default
_CONVOLVE_IN_PLACE = torch.ops.gdn.causal_conv1d_.default


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | SlotState | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    state_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | SlotState | None]:
    """``torch_chunk_gated_delta_rule`` of the model code: prefill and training.

    Args:
        query: ``[B, T, H, K]``.
        key: ``[B, T, H, K]``.
        value: ``[B, T, HV, V]``.
        g: Log decay, ``[B, T, HV]``.
        beta: Write strength, ``[B, T, HV]``.
        chunk_size: Not used: it cannot change the result but by rounding.
        initial_state: ``[N, HV, K, V]``, any strides. Written where it is V-major and no gradient
            is asked for; a ``SlotState`` updates itself. Default: zeros.
        output_final_state: Return the final state instead of None.
        use_qk_l2norm_in_kernel: Normalise ``query`` and ``key``.
        cu_seqlens: Bounds of packed sequences, ``[N + 1]``.
        state_dtype: The dtype of a state that starts here, which a cache keeps. Default: that of
            the arithmetic, float32.
        **kwargs: What else the model code passes on; not used.

    Returns:
        o: ``[B, T, HV, V]``, dtype of ``query``.
        final_state: ``[N, HV, K, V]`` in V-major memory, or None; ``initial_state`` itself where
            that was written.
    """
    tokens = (query, key, value, g.to(arithmetic_dtype(query.dtype)), beta)
    return _gated_delta_rule(
        _CHUNK,
        tokens,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        state_dtype,
    )


def recurrent_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | SlotState | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | SlotState | None]:
    """``torch_recurrent_gated_delta_rule`` of the model code: decode.

    Arguments and results are those of ``chunk_gated_delta_rule`` in this file.
    """
    tokens = (query, key, value, g.to(arithmetic_dtype(query.dtype)), beta)
    return _gated_delta_rule(
        _RECURRENT,
        tokens,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
    )


def _gated_delta_rule(
    operators: tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]],
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    state: Tensor | SlotState | None,
    output_final_state: bool,
    use_qk_l2norm: bool,
    cu_seqlens: Tensor | None,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | SlotState | None]:
    """One of the two rules, by its functional operator and the one in place."""
    functional, in_place = operators
    if isinstance(state, SlotState):
        return state.gated_delta_rule(*tokens, use_qk_l2norm), state
    options = {"cu_seqlens": cu_seqlens, "use_qk_l2norm": use_qk_l2norm}
    if output_final_state and _in_place(state, *tokens):
        assert state is not None
        return in_place(*tokens, state.transpose(-1, -2), None, **options), state
    o, final_state = functional(*tokens, _v_first(state), **options)
    if state is None and state_dtype is not None:
        final_state = final_state.to(state_dtype)
    return o, final_state.transpose(-1, -2) if output_final_state else None


def causal_conv1d_fn(
    hidden_states: Tensor | SlotInputs,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """``causal_conv1d_fn`` of the model code: whole sequences, no history.

    Args:
        hidden_states: Channel-major, ``[B, D, T]``, any strides; ``SlotInputs`` bring the history.
        weight: ``[D, W]``.
        bias: ``[D]`` or None.
        activation: Name of an activation of transformers, or None.
        seq_idx: Number of the sequence of each token, ``[1, T]``; says the same as
            ``cu_seq_lens_q``, which is what the convolution reads.
        cu_seq_lens_q: Bounds of packed sequences, ``[N + 1]``.
        **kwargs: What else the model code passes on; not used.

    Returns:
        ``[B, D, T]``, dtype of ``hidden_states``; its memory is token-major.

    Raises:
        ValueError: ``seq_idx`` is given without ``cu_seq_lens_q``, which the gated delta rule
            needs.
    """
    if seq_idx is not None and cu_seq_lens_q is None:
        raise ValueError("causal_conv1d_fn: cu_seq_lens_q must be given with seq_idx, got None")
    fused, after = _split_activation(activation)
    slots = hidden_states.state if isinstance(hidden_states, SlotInputs) else None
    hidden_states = hidden_states.x if isinstance(hidden_states, SlotInputs) else hidden_states
    x = _in_dtype_of(weight, hidden_states).transpose(1, 2)
    if slots is not None:
        y = slots.convolve(x, weight, bias, fused)
    else:
        y, _ = _CONVOLVE(x, weight, bias, cu_seqlens=cu_seq_lens_q, activation=fused)
    return after(y.transpose(1, 2)).to(hidden_states.dtype)


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """``causal_conv1d_update`` of the model code: the next tokens, the history in place.

    Args:
        hidden_states: Channel-major, ``[B, D, T]``, any strides.
        conv_state: The last inputs, ``[B, D, W]`` or longer; its last ``W - 1`` columns are read
            and written. Those before them are never read by the model code, and keep what they
            hold.
        weight: ``[D, W]``.
        bias: ``[D]`` or None.
        activation: Name of an activation of transformers, or None.
        **kwargs: What else the model code passes on; not used.

    Returns:
        ``[B, D, T]``, dtype of ``hidden_states``; its memory is token-major.
    """
    fused, after = _split_activation(activation)
    x = _in_dtype_of(weight, hidden_states).transpose(1, 2)
    history = conv_state[:, :, 1 - weight.shape[1] :]
    if _needs_gradient(x, weight, bias):
        y, recent = _CONVOLVE(x, weight, bias, history, activation=fused)
        with torch.no_grad():
            history.copy_(recent)
    else:
        y = _CONVOLVE_IN_PLACE(x, weight, bias, history, activation=fused)
    return after(y.transpose(1, 2)).to(hidden_states.dtype)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _in_place(state: Tensor | None, *tensors: Tensor) -> bool:
    """Whether an operator may update ``state [N, HV, K, V]`` where it lies."""
    if state is None or _needs_gradient(state, *tensors):
        return False
    return state.stride(-2) == 1 and state.stride(-1) == state.shape[-2]


def _v_first(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.transpose(-1, -2)


def _in_dtype_of(weight: Tensor, x: Tensor) -> Tensor:
    """``x`` as the convolution takes it beside ``weight``, rounded as in the model code."""
    return x if weight.dtype in (x.dtype, torch.float32) else x.to(weight.dtype)


def _split_activation(name: str | None) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    """The activation that the operator applies, and what is left to apply to its output."""
    if name in (None, "silu", "swish"):
        return None if name is None else "silu", lambda y: y
    from transformers.activations import ACT2FN

    return None, ACT2FN[name]


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
    "torch_recurrent_gated_delta_rule": recurrent_gated_delta_rule,
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
}


@functools.cache
def replacements(state_dtype: torch.dtype = torch.float32) -> dict[str, Callable[..., Any]]:
    """``REPLACEMENTS`` for states of a dtype; the same functions at each call, as compilers ask."""
    if state_dtype == torch.float32:
        return REPLACEMENTS
    chunk_rule = functools.partial(chunk_gated_delta_rule, state_dtype=state_dtype)
    return REPLACEMENTS | {"torch_chunk_gated_delta_rule": chunk_rule}
