"""Puts functions in their places and undoes it."""

from types import TracebackType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gdn_ops.integrations.transformers.releases import Owner, Place, places

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# By owner and name. A layer that is gone needs no undoing, and nothing here keeps it.
Values = WeakKeyDictionary[Owner, dict[str, Any]]
# What stands for an attribute that an owner has from its class only, or from a class above.
_INHERITED = object()


class Installation:
    """What ``use_gdn_ops`` returns: ends by ``undo()`` or at the end of a ``with`` block."""

    # What the model code had before the first of the installations that are in force.
    _originals: ClassVar[Values] = WeakKeyDictionary()
    # In the order in which they were made: the last has its way.
    _in_force: ClassVar[list["Installation"]] = []

    def __init__(self, wanted: list[Place]) -> None:
        self._placed: Values = WeakKeyDictionary()
        for owner, name, value in wanted:
            self._placed.setdefault(owner, {})[name] = value
            before = vars(owner).get(name, _INHERITED)
            Installation._originals.setdefault(owner, {}).setdefault(name, before)
            setattr(owner, name, value)
        Installation._in_force.append(self)

    def undo(self) -> None:
        """End it, in any order with others that overlap; twice is once."""
        if self not in Installation._in_force:
            return
        Installation._in_force.remove(self)
        for owner, functions in self._placed.items():
            originals = Installation._originals[owner]
            for name in functions:
                value, is_original = originals[name], True
                for other in Installation._in_force:
                    if name in other._placed.get(owner, {}):
                        value, is_original = other._placed[owner][name], False
                if value is _INHERITED:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)
                if is_original:
                    del originals[name]

    def __enter__(self) -> "Installation":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def check_state_dtype(op: str, state_dtype: torch.dtype) -> None:
    """Raise ``ValueError`` where states cannot be kept in a dtype."""
    if state_dtype not in STATE_DTYPES:
        raise ValueError(
            f"{op}: state_dtype must be float32, bfloat16 or float16, got {state_dtype}"
        )


def use_gdn_ops(
    model: nn.Module | None = None, *, state_dtype: torch.dtype = torch.float32
) -> Installation:
    """Put the operators under the model code of transformers: a function and a context manager.

        use_gdn_ops()                        for the rest of the process, or until .undo()
        with use_gdn_ops(model): ...         until the end of the block

    With transformers 5.15 and newer it acts on the functions of the modeling modules, and so on
    every model of a family in the process, whether it was built before or after; with 5.14 and
    older on the layers of ``model``. A compiled model is compiled once more. With 5.23 and newer
    ``generate`` takes ``prompt_lookup_num_tokens`` and ``assistant_model`` (docs/speculative.md).

    Args:
        model: Its families are served, and it must have layers of one. It must be given with
            transformers 5.14 and older. Default: all families that this release has.
        state_dtype: float32, bfloat16 or float16: the dtype of the recurrent states of a cache
            that is filled from now on. A state is rounded to it after each call, the arithmetic
            stays float32. Default: float32. A model in float64 keeps float64 states.

    Returns:
        An object with ``undo()``, which ends it; also a context manager.

    Raises:
        ValueError: ``model`` has no layer of a family that is served, or must be given and is not;
            ``state_dtype`` is another dtype.
        NotImplementedError: this release of transformers lays out its model code in another way.

    Source: tests/test_use_gdn_ops.py; ``make transformers-matrix`` for the releases.
    """
    check_state_dtype("use_gdn_ops", state_dtype)
    return Installation(list(places(model, state_dtype)))
