"""Launching a kernel with little work in Python.

Triton looks at every argument of every launch to find the binary that serves it, 60 us for the 70
arguments of a kernel here. What it looks at is remembered instead, and the binary with it.
"""

from typing import Any

import torch
from torch import Tensor

# Binaries by what they were compiled for. Lengths are part of it, so it is emptied when it is full.
_BINARIES: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
_MOST_BINARIES = 4096


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> None:
    """Launch ``kernel`` on a grid of ``programs``.

    Args:
        kernel: A ``@triton.jit`` function.
        programs: Number of programs.
        tensors: Its first arguments; None where absent.
        numbers: The arguments after those: strides and sizes.
        num_warps: Warps of a program.
        num_stages: Stages of its loops' pipelines.
        constants: The other arguments, by name.
    """
    kinds = tuple([x if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors])
    device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    key = (kernel, kinds, numbers, *constants.values(), num_warps, num_stages, device)
    found = _BINARIES.get(key)
    if found is not None:
        binary, values = found
        binary[(programs, 1, 1)](*tensors, *numbers, *values)
        return
    binary = kernel[(programs,)](
        *tensors, *numbers, **constants, num_warps=num_warps, num_stages=num_stages
    )
    # The interpreter returns nothing.
    if binary is not None:
        if len(_BINARIES) >= _MOST_BINARIES:
            _BINARIES.clear()
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _BINARIES[key] = (binary, tuple(constants[name] for name in names))


def strides(x: Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides of a tensor, zero for dimensions that it does not have."""
    if x is None:
        return (0,) * rank
    own: tuple[int, ...] = x.stride()
    return own if len(own) == rank else (*own, *(0,) * (rank - len(own)))
