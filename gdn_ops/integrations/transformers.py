"""The operators under Hugging Face transformers' model code, without a change to the model.

The model code of transformers reaches its gated delta rule and its convolution through four
functions of its module. ``use_gdn_ops`` puts the functions of this file in their place:

    torch_chunk_gated_delta_rule        torch.ops.gdn.chunk, chunk_ where a cache holds the state
    torch_recurrent_gated_delta_rule    torch.ops.gdn.recurrent_
    causal_conv1d_fn                    torch.ops.gdn.causal_conv1d
    causal_conv1d_update                torch.ops.gdn.causal_conv1d_

The state in a cache keeps the shape that transformers gives it, ``[B, HV, K, V]``, but its memory
is V-major: ``state.transpose(-1, -2)`` is a contiguous ``[B, HV, V, K]``, which the operators
update in place. So a cache may be filled with these functions and used without them, or the other
way round; one that is not V-major is served by the functional operators and copied at each step.

Source: transformers 5.15 to 5.23, ``models/qwen3_next/modeling_qwen3_next.py``; checked by
tests/test_transformers.py.
"""

import importlib
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gdn_ops._checks import arithmetic_dtype
from gdn_ops.causal_conv1d import causal_conv1d, causal_conv1d_
from gdn_ops.chunk import chunk, chunk_
from gdn_ops.recurrent import recurrent, recurrent_

FAMILIES = ("qwen3_next",)


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``torch_chunk_gated_delta_rule`` of the model code: prefill and training.

    Args:
        query: ``[B, T, H, K]``.
        key: ``[B, T, H, K]``.
        value: ``[B, T, HV, V]``.
        g: Log decay, ``[B, T, HV]``.
        beta: Write strength, ``[B, T, HV]``.
        chunk_size: Not used: it cannot change the result but by rounding.
        initial_state: ``[N, HV, K, V]``, any strides. Written where it is V-major and no gradient
            is asked for. Default: zeros.
        output_final_state: Return the final state instead of None.
        use_qk_l2norm_in_kernel: Normalise ``query`` and ``key``.
        cu_seqlens: Bounds of packed sequences, ``[N + 1]``.
        **kwargs: What else the model code passes on; not used.

    Returns:
        o: ``[B, T, HV, V]``, dtype of ``query``.
        final_state: ``[N, HV, K, V]`` in V-major memory, or None; ``initial_state`` itself where
            that was written.
    """
    tokens = (query, key, value, g.to(arithmetic_dtype(query.dtype)), beta)
    if output_final_state and _in_place(initial_state, *tokens):
        assert initial_state is not None
        o = chunk_(
            *tokens,
            initial_state.transpose(-1, -2),
            None,
            cu_seqlens=cu_seqlens,
            use_qk_l2norm=use_qk_l2norm_in_kernel,
        )
        return o, initial_state
    o, final_state = chunk(
        *tokens, _v_first(initial_state), cu_seqlens, use_qk_l2norm=use_qk_l2norm_in_kernel
    )
    return o, final_state.transpose(-1, -2) if output_final_state else None


def recurrent_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``torch_recurrent_gated_delta_rule`` of the model code: decode.

    Arguments and results are those of ``chunk_gated_delta_rule`` in this file.
    """
    tokens = (query, key, value, g.to(arithmetic_dtype(query.dtype)), beta)
    if output_final_state and _in_place(initial_state, *tokens):
        assert initial_state is not None
        o = recurrent_(
            *tokens,
            initial_state.transpose(-1, -2),
            cu_seqlens=cu_seqlens,
            use_qk_l2norm=use_qk_l2norm_in_kernel,
        )
        return o, initial_state
    o, final_state = recurrent(
        *tokens, _v_first(initial_state), cu_seqlens, use_qk_l2norm=use_qk_l2norm_in_kernel
    )
    return o, final_state.transpose(-1, -2) if output_final_state else None


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """``causal_conv1d_fn`` of the model code: whole sequences, no history.

    Args:
        hidden_states: Channel-major, ``[B, D, T]``, any strides.
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
    x = _in_dtype_of(weight, hidden_states).transpose(1, 2)
    y, _ = causal_conv1d(x, weight, bias, cu_seqlens=cu_seq_lens_q, activation=fused)
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
        y, recent = causal_conv1d(x, weight, bias, history, activation=fused)
        with torch.no_grad():
            history.copy_(recent)
    else:
        y = causal_conv1d_(x, weight, bias, history, activation=fused)
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


class Installation:
    """What ``use_gdn_ops`` returns: ends by ``undo()`` or at the end of a ``with`` block."""

    # What the model code had before the first of the installations that are in force.
    _originals: ClassVar[dict[tuple[ModuleType, str], Any]] = {}
    _in_force: ClassVar[int] = 0

    def __init__(self, modules: list[ModuleType]) -> None:
        self._undone = False
        Installation._in_force += 1
        for module in modules:
            for name, replacement in REPLACEMENTS.items():
                Installation._originals.setdefault((module, name), getattr(module, name))
                setattr(module, name, replacement)

    def undo(self) -> None:
        """End it. The last of several that overlap restores the model code; twice is once."""
        if self._undone:
            return
        self._undone = True
        Installation._in_force -= 1
        if Installation._in_force == 0:
            for (module, name), original in Installation._originals.items():
                setattr(module, name, original)
            Installation._originals.clear()

    def __enter__(self) -> "Installation":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def use_gdn_ops(model: nn.Module | None = None) -> Installation:
    """Put the operators under the model code of transformers: a function and a context manager.

        use_gdn_ops()                        for the rest of the process, or until .undo()
        with use_gdn_ops(model): ...         until the end of the block

    It acts on the functions of the modeling modules, and so on every model of a family in the
    process, whether it was built before or after; a compiled model is compiled once more.

    Args:
        model: Checked, if given, to have layers that are served. Default: no check.

    Returns:
        An object with ``undo()``, which ends it; also a context manager.

    Raises:
        ValueError: ``model`` has no layer of a family that is served.
        NotImplementedError: this release of transformers lays out its model code in another way.

    Source: tests/test_transformers.py.
    """
    modules = [_modeling(family) for family in FAMILIES]
    if model is not None:
        served = {module.__name__ for module in modules}
        layers = (type(m) for m in model.modules())
        if not any(t.__module__ in served and t.__name__.endswith("GatedDeltaNet") for t in layers):
            raise ValueError(
                f"use_gdn_ops: model must have gated delta net layers of {', '.join(FAMILIES)}, "
                f"got {type(model).__name__}"
            )
    return Installation(modules)


def _modeling(family: str) -> ModuleType:
    """The modeling module of a family."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    missing = [name for name in REPLACEMENTS if not hasattr(module, name)]
    if missing:
        from transformers import __version__

        raise NotImplementedError(
            f"use_gdn_ops: transformers must be 5.15 or newer, got {__version__}, "
            f"whose {family} has no {missing[0]}"
        )
    return module
