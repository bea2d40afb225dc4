"""Allocating the outputs of a call that was planned (``kernels/plan.py``, ``cpu/call.py``)."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

try:
    # Its functions allocate on the current device in half the time of torch.empty_strided. Code of
    # Inductor calls them; they are private: without them calls only take longer.
    from torch._C._dynamo import guards as _quick
except ImportError:
    _quick = None  # type: ignore[assignment]

# empty(size, stride, dtype)
Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]


class Allocator:
    """Of memory on a device that a call writes."""

    def __init__(self, device: torch.device) -> None:
        self._filled: Empty = functools.partial(_empty, device)
        self._quick: Empty = getattr(_quick, f"_empty_strided_{device.type}", self._filled)

    def find(self) -> Empty:
        """The function of now: it fills where PyTorch is asked to."""
        return self._filled if torch.are_deterministic_algorithms_enabled() else self._quick


def _empty(
    device: torch.device, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Filled where ``torch.utils.deterministic.fill_uninitialized_memory`` asks for it."""
    return torch.empty_strided(size, stride, dtype=dtype, device=device)
