"""Gates that a kernel computes where it would load them: one element for each token and head.

Inductor has no prologue for a template that writes in place, nor for exponentials before an output
of 16 bits. The gates of a layer are a few instructions for each number, so a kernel that reads one
at a time computes it, and two launches and two tensors less remain.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import _inductor
from ._inductor import IRNode

Tensors = dict[str, IRNode | None]
# Arguments of the delta rule that a layer makes of its projections.
GATES = ("g", "beta")


class Computed(NamedTuple):
    """A tensor that is in no memory yet, as a kernel computes it."""

    element: Any  # the subgraph of a template that makes one element of it
    origins: list[Any]  # the user's operations


def element_index(rank: int) -> list[str]:
    """Names of the variables of a template that say which element a subgraph makes."""
    return [f"i_{dim}" for dim in range(rank)]


def take_computed(
    tensors: Tensors, names: Sequence[str], rank: int, written: IRNode
) -> tuple[Tensors, dict[str, Computed]]:
    """``tensors`` without those that are in no memory yet, and these.

    Args:
        tensors: Of a call.
        names: Of those that may be taken.
        rank: Of what the kernel can compute; others are left.
        written: What the kernel writes. Nothing may be computed from it, since another program may
            have written it by then.
    """
    taken, place = {}, _inductor.storage_name(written)
    for name in names:
        x = tensors[name]
        if x is None or len(x.get_size()) != rank:
            continue
        found = _inductor.computed(x, element_index(rank))
        if found is not None:
            element, sources, origins = found
            if place not in sources:
                taken[name] = Computed(element, origins)
    return {name: None if name in taken else x for name, x in tensors.items()}, taken
