"""Which calls are alike: they pass the same checks and lead to the same launches.

Checks and launching functions look at shapes, strides, dtypes, devices and options, and at whether
an address is a multiple of 16 bytes, which Triton compiles for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    # Compares eight tensors in 0.4 us, where a tuple of their attributes takes 4 us to make. It is
    # what torch.compile guards its code with, and private: without it calls only take longer.
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment,misc]

# match(args, keywords): tensors of the call and their addresses; None where its key is another.
Match = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Sequence[Tensor], list[int]] | None]


# Lengths are part of a key, so plans are forgotten when there are many.
MOST_PLANS = 4096


class Plans:
    """What is done for calls that were checked (``kernels/plan.py``), by their keys."""

    def __init__(self) -> None:
        self._plans: dict[Any, tuple[Match, Any]] = {}
        # Of the last call; the layers of a model are alike.
        self.recent: tuple[Match, Any] = (match_nothing, None)

    def __len__(self) -> int:
        return len(self._plans)

    def find(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        """The plan for such a call, with what it takes; None for one that is new."""
        key = call_key(args, keywords)
        found = self._plans.get(key)
        if found is None:
            return None, None
        tensors = [x for x in args if x is not None]
        pointers = [x.data_ptr() for x in tensors]
        match, plan = found
        # Guards of torch also compare what a thread has set, as inference mode.
        if match is not match_nothing and match(args, keywords) is None:
            found = self._plans[key] = (matcher(args, keywords), plan)
        self.recent = found
        return plan, (tensors, pointers)

    def add(self, args: tuple[Any, ...], keywords: dict[str, Any], plan: Any) -> None:
        """Remember the plan of a call."""
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        self._plans[call_key(args, keywords)] = self.recent = (matcher(args, keywords), plan)


def call_key(args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
    """All that a check or a launching function may look at.

    Args:
        args: The arguments, tensors or None.
        keywords: The options. The dispatcher leaves out what has its default value, so that their
            names are part of the key.
    """
    tensors = [x for x in args if x is not None]
    key = (
        *[x if x is None else x.shape for x in args],
        *[x.stride() for x in tensors],
        *[x.dtype for x in tensors],
        *[x.device for x in tensors],
        *[x.data_ptr() % 16 for x in tensors],
        *keywords.items(),
    )
    if torch.version.hip is not None:  # Triton for AMD reads smaller tensors by other instructions
        key += tuple([x.untyped_storage().nbytes() < 2**31 for x in tensors])
    return key


def matcher(args: tuple[Any, ...], keywords: dict[str, Any]) -> Match:
    """A quick test whether another call has the key of this one. It may say no too often."""
    is_aligned = all(x is None or x.data_ptr() % 16 == 0 for x in args)
    if TensorGuards is None or torch.version.hip is not None or not is_aligned:
        return match_nothing
    length, options = len(args), dict(keywords)
    absent = [i for i, x in enumerate(args) if x is None]
    given = [i for i, x in enumerate(args) if x is not None]
    tensors = [args[i] for i in given]
    sizes: Any = [list(x.shape) for x in tensors]  # fixed ones: the guards default to any
    strides: Any = [list(x.stride()) for x in tensors]
    guards = TensorGuards(
        *tensors,
        dynamic_dims_sizes=sizes,
        dynamic_dims_strides=strides,
    )
    check, data_ptr = guards.check, Tensor.data_ptr

    def match(
        args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Sequence[Tensor], list[int]] | None:
        if len(args) != length or keywords != options:
            return None
        for i in absent:
            if args[i] is not None:
                return None
        tensors = [args[i] for i in given] if absent else args
        if not check(*tensors):
            return None
        pointers = [*map(data_ptr, tensors)]
        bits = 0
        for p in pointers:
            bits |= p
        return None if bits % 16 else (tensors, pointers)

    return match


def match_nothing(args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """The matcher of no call."""
