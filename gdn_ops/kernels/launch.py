"""Launching a kernel."""

import contextlib
from typing import Any

from torch import Tensor

from .record import active_recorder

# Of every launch, as of Inductor's templates. Triton 3.9 warns where it is not asked for, since the
# next release does not fuse a product with a sum by itself.
OPTIONS = {"enable_fp_fusion": True}


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | None, ...],
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> None:
    """Launch ``kernel`` on a grid of ``programs``.

    Args:
        kernel: A ``@triton.jit`` function, or a ``@gluon.jit`` one.
        programs: Number of programs.
        tensors: Its first arguments; None where absent.
        numbers: The arguments after those: strides and sizes; None where absent.
        num_warps: Warps of a program.
        num_stages: Stages of its loops' pipelines.
        constants: The other arguments, by name, and further options of Triton.
    """
    recorder = active_recorder()
    with contextlib.nullcontext() if recorder is None else recorder.paused():
        binary = kernel[(programs,)](
            *tensors, *numbers, **constants, num_warps=num_warps, num_stages=num_stages, **OPTIONS
        )
    if recorder is not None:
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        others = (*numbers, *(constants[name] for name in names))
        recorder.note_launch(binary, programs, tensors, others)


def strides(x: Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides of a tensor, zero for dimensions that it does not have."""
    if x is None:
        return (0,) * rank
    own: tuple[int, ...] = x.stride()
    return own if len(own) == rank else (*own, *(0,) * (rank - len(own)))


def fits_descriptor(*tensors: Tensor) -> bool:
    """Whether every row of every head starts and ends at a multiple of 16 bytes, without gaps.

    A descriptor that ends elsewhere is not cut where it ends (Triton's issue 11583).
    """
    for x in tensors:
        size = x.element_size()
        b, t, h, d = x.stride()
        if d != 1 or (x.data_ptr() | b * size | t * size | h * size | x.shape[3] * size) % 16:
            return False
    return True
