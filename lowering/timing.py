"""Inputs on which ``max_autotune`` times choices, each made from the node in whose place it is."""

from collections.abc import Callable
from typing import Any

import torch

from . import _inductor
from ._inductor import IRNode


def same_number(value: int) -> Callable[[IRNode], torch.Tensor]:
    """Indices that are all ``value``."""
    return lambda x: torch.full(
        _inductor.hints(x.get_size()), value, dtype=x.get_dtype(), device=x.get_device()
    )


def even_bounds(tokens: Any) -> Callable[[IRNode], torch.Tensor]:
    """Packed sequences of one length."""

    def make(x: IRNode) -> torch.Tensor:
        (count,), (end,) = _inductor.hints(x.get_size()), _inductor.hints([tokens])
        return torch.linspace(0, end, count, device=x.get_device()).to(x.get_dtype())

    return make


def few_slots(count: Any) -> Callable[[IRNode], torch.Tensor]:
    """A pool of ``count`` slots with the strides of the caller's, never his own."""

    def make(x: IRNode) -> torch.Tensor:
        size = _inductor.hints([count, *x.get_size()[1:]])
        strides = _inductor.hints(x.get_stride())
        pool = torch.empty_strided(size, strides, dtype=x.get_dtype(), device=_inductor.device(x))
        return pool.normal_()

    return make
