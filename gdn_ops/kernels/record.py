"""Noting what a launching function does, for a plan (``plan.py``)."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .plan import Allocation, Call, Launch, Plan, make_step, scratch_size, takes_scratch

aten = torch.ops.aten

_ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


class Recorder(TorchDispatchMode):
    """Notes every call of torch and every launch of this thread while it is entered."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self._values: list[Any] = [None, *tensors]
        self._places = {id(x): i for i, x in enumerate(self._values)}
        self._made: dict[int, Allocation] = {}
        self._steps: list[Launch | Call] = []
        self._device = tensors[0].device
        self._kept: list[Tensor] = []
        self._is_complete = True
        self._is_paused = False

    def __enter__(self) -> "Recorder":
        _ACTIVE.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_paused:
            self._note_call(func, args, kwargs or {}, result)
        return result

    def plan(self, results: Any) -> Plan | None:
        """The plan of what was noted; None where something cannot be repeated."""
        places = [self._place(x) for x in (results if isinstance(results, tuple) else (results,))]
        if not self._is_complete:
            return None
        calls = [x for x in self._steps if isinstance(x, Call)]
        seen = {*places, *(i for x in calls for i in x.places.values())}
        pieces = [i for i in self._made if i not in seen]
        tensors = [i for i in self._made if i in seen]
        made = [x.result for x in calls if x.result is not None]
        others = [i for i in range(1, len(self._values)) if i not in self._made and i not in made]
        order = [0, *pieces, *others, *tensors, *made]
        new = {place: i for i, place in enumerate(order)}
        return Plan(
            [self._made[i] for i in pieces],
            [self._made[i] for i in tensors],
            len(made),
            tuple([make_step(x, new) for x in self._steps]),
            tuple([new[i] for i in places]) if isinstance(results, tuple) else new[places[0]],
            self._device,
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Notes nothing: what Triton itself allocates for a launch."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def note_launch(
        self,
        binary: Any,
        programs: int,
        tensors: tuple[Tensor | None, ...],
        others: tuple[Any, ...],
    ) -> None:
        """A kernel was launched; the interpreter has no binary."""
        places = tuple([self._place(x) for x in tensors])
        if binary is None:
            self._is_complete = False
        if not self._is_complete:
            return
        scratch, size = 0, scratch_size(binary, programs)
        if size and takes_scratch(binary):
            scratch = self._add(None, Allocation((size,), (1,), torch.uint8))
        self._steps.append(Launch(binary, programs, scratch, places, others))

    def _note_call(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        if func in _ALLOCATIONS:
            if result.device != self._device:
                self._is_complete = False
            size, stride = tuple(result.size()), result.stride()
            self._add(result, Allocation(size, stride, result.dtype))
            return
        if func is aten.detach.default:  # torch's own, of what a mode returns
            self._places[id(result)] = self._place(args[0])
            self._kept.append(result)
            return
        nested = (x for x in (*args, *kwargs.values()) if isinstance(x, list | tuple))
        has_nested = any(isinstance(y, Tensor) for x in nested for y in x)
        if has_nested or any(isinstance(x, Tensor) for x in kwargs.values()):
            self._is_complete = False
        if not isinstance(result, Tensor):  # a number that was read from memory
            self._is_complete = False
            return
        places = {i: self._place(x) for i, x in enumerate(args) if isinstance(x, Tensor)}
        is_new = id(result) not in self._places
        # Without the tensors, which a plan must not keep alive.
        fixed = tuple([None if isinstance(x, Tensor) else x for x in args])
        made = self._add(result) if is_new else None
        self._steps.append(Call(func, fixed, kwargs, places, made))

    def _add(self, x: Tensor | None, allocation: Allocation | None = None) -> int:
        """The place of something new; ``x`` is kept, and so its id."""
        place = len(self._values)
        self._values.append(x)
        if x is not None:
            self._places[id(x)] = place
        if allocation is not None:
            self._made[place] = allocation
        return place

    def _place(self, x: Any) -> int:
        place = self._places.get(id(x))
        if place is None:  # not of this call: a constant of the launching function
            self._is_complete = False
            return 0
        return place


class _Active(threading.local):
    recorder: Recorder | None = None


_ACTIVE = _Active()


def record(call: Callable[[], Any], args: tuple[Tensor | None, ...]) -> tuple[Any, Plan | None]:
    """The result of a launching function, and the plan of what it did where it can be repeated.

    Args:
        call: The function with its arguments.
        args: Its tensors.
    """
    with Recorder([x for x in args if x is not None]) as recorder:
        result = call()
    return result, recorder.plan(result)


def active_recorder() -> Recorder | None:
    """The recorder that this thread has entered."""
    return _ACTIVE.recorder
