"""Inputs on which ``max_autotune`` times choices, each made from the node in whose place it is."""

from collections.abc import Callable, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]  # it has no stubs
import torch

from . import _inductor
from ._inductor import IRNode


def can_be_made(x: IRNode) -> bool:
    """Whether scratch may stand for ``x``: a template adds an offset itself, past its end."""
    return _inductor.is_known(sympy.Eq(x.get_layout().offset, 0))


def _scratch(x: IRNode, size: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory with the strides of ``x``, and all of it flat, to be filled.

    Elements of an expanded tensor share memory, and torch fills no such tensor.
    """
    sizes, strides = _inductor.hints(size), _inductor.hints(x.get_stride())
    made = torch.empty_strided(sizes, strides, dtype=x.get_dtype(), device=_inductor.device(x))
    elements = made.untyped_storage().nbytes() // made.element_size()
    return made, made.as_strided([elements], [1])


def same_number(value: int) -> Callable[[IRNode], torch.Tensor]:
    """Indices that are all ``value``."""

    def make(x: IRNode) -> torch.Tensor:
        indices, flat = _scratch(x, x.get_size())
        flat.fill_(value)
        return indices

    return make


def even_bounds(tokens: Any) -> Callable[[IRNode], torch.Tensor]:
    """Packed sequences of one length."""

    def make(x: IRNode) -> torch.Tensor:
        bounds, _ = _scratch(x, x.get_size())
        [end] = _inductor.hints([tokens])
        return bounds.copy_(torch.linspace(0, end, len(bounds), device=bounds.device))

    return make


def few_slots(count: Any) -> Callable[[IRNode], torch.Tensor]:
    """A pool of ``count`` slots with the strides of the caller's, never his own."""

    def make(x: IRNode) -> torch.Tensor:
        pool, flat = _scratch(x, [count, *x.get_size()[1:]])
        flat.normal_()
        return pool

    return make


def of_rows(x: IRNode, cu_seqlens: IRNode | None, indices: IRNode | None) -> dict[str, Any]:
    """What makes the states of an operator and all that says which rows reach which of them.

    Slots and bounds are valid, and a pool has no more slots than are reached.

    Args:
        x: A tensor with the operator's batch and tokens, ``[B, T, ...]``.
        cu_seqlens: The bounds of packed sequences; None: not packed.
        indices: The slots of rows; None: each has its own.
    """
    B, T = x.get_size()[:2]
    N = B if cu_seqlens is None else cu_seqlens.get_size()[0] - 1
    return {
        "state": few_slots(N if indices is None else 1),
        "state_indices": same_number(0),
        "read_indices": same_number(0),
        "num_accepted_tokens": same_number(1),
        "cu_seqlens": even_bounds(T),
    }
