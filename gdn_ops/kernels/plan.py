"""Plans: what a launching function does for one kind of call, noted once and then done without it.

A launching function reads shapes, strides, dtypes, devices and flags, never data. So two calls that
agree in these, and in which pointers are multiples of 16 bytes, allocate the same tensors and
launch the same binaries with the same numbers; only the pointers differ. Working all that out takes
ten times as long as the launch: a decode step does it once.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

aten = torch.ops.aten

# step(values, pointers, stream): `values` and `pointers` start with None, for what is absent, and
# the arguments of the call; a step appends what it makes.
Step = Callable[[list[Any], list[Any], int], None]

_ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


class Plan:
    """The steps of a call, and which values it returns."""

    def __init__(self, steps: tuple[Step, ...], results: int | tuple[int, ...], device: int):
        self._steps, self._results, self._device = steps, results, device

    def __call__(self, tensors: Sequence[Tensor], pointers: list[int]) -> Any:
        """Do the steps on the current stream.

        Args:
            tensors: The arguments that are not None.
            pointers: Their addresses.
        """
        active, device = driver.active, self._device
        if active.get_current_device() != device:
            with torch.cuda.device(device):
                return self(tensors, pointers)
        values: list[Any] = [None, *tensors]
        addresses: list[Any] = [None, *pointers]
        stream = active.get_current_stream(device)
        for step in self._steps:
            step(values, addresses, stream)
        results = self._results
        return values[results] if isinstance(results, int) else tuple([values[i] for i in results])


class Recorder(TorchDispatchMode):
    """Notes every call of torch and every launch of this thread while it is entered."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self._values: list[Any] = [None, *tensors]
        self._places = {id(x): i for i, x in enumerate(self._values)}
        self._kept: list[Tensor] = []
        self._steps: list[Step] = []
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
        which = tuple(places) if isinstance(results, tuple) else places[0]
        return Plan(tuple(self._steps), which, driver.active.get_current_device())

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
        places = [self._place(x) for x in tensors]
        if binary is None:
            self._is_complete = False
        if self._is_complete:
            self._steps.append(_launch_step(binary, programs, places, others))

    def _note_call(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        if func in _ALLOCATIONS:
            self._steps.append(self._allocation(result))
            self._add(result, len(self._values))
            return
        if func is aten.detach.default:  # torch's own, of what a mode returns
            self._add(result, self._place(args[0]))
            return
        nested = (x for x in (*args, *kwargs.values()) if isinstance(x, list | tuple))
        has_nested = any(isinstance(y, Tensor) for x in nested for y in x)
        if has_nested or any(isinstance(x, Tensor) for x in kwargs.values()):
            self._is_complete = False
        if not isinstance(result, Tensor):  # a number that was read from memory
            self._is_complete = False
            return
        places = [(i, self._place(x)) for i, x in enumerate(args) if isinstance(x, Tensor)]
        is_new = id(result) not in self._places
        if is_new:
            self._add(result, len(self._values))
        self._steps.append(_call_step(func, args, kwargs, places, is_new))

    def _allocation(self, x: Tensor) -> Step:
        size, stride, dtype, device = x.size(), x.stride(), x.dtype, x.device
        if stride == torch.empty(size, device="meta").stride():
            for place, y in enumerate(self._values[1:], 1):
                if (y.size(), y.dtype, y.device) == (size, dtype, device):
                    return _allocation_like_step(place)  # half the time
        return _allocation_step(size, stride, dtype, device)

    def _add(self, x: Tensor, place: int) -> None:
        self._places[id(x)] = place
        self._kept.append(x)  # and so its id
        if place == len(self._values):
            self._values.append(x)

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


def new_scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the tensor descriptors that a kernel makes: an allocator for Triton."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _entry(binary: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What starts a kernel, as ``JITFunction.run`` does, and its arguments after the stream.

    In Triton 3.6 that is a Python class around a C function, which allocates scratch and takes 1 us
    of a launch's 2.3; where there is no scratch the C function serves. Triton 3.7 has another.
    """
    run, packed_metadata = binary.run, binary.packed_metadata
    is_nvidia = torch.version.hip is None
    if triton.__version__.startswith("3.6.") and is_nvidia and not _has_scratch(binary):
        modes = (run.launch_cooperative_grid, run.launch_pdl)
        return run.launch, (binary.function, *modes, None, None, packed_metadata)
    return run, (binary.function, packed_metadata)


def _has_scratch(binary: Any) -> bool:
    sizes = ("global_scratch_size", "profile_scratch_size")
    return any(getattr(binary.metadata, name, 0) for name in sizes)


def _launch_step(binary: Any, programs: int, places: list[int], others: tuple[Any, ...]) -> Step:
    needs_scratch = _has_scratch(binary)
    start, options = _entry(binary)
    hooks = knobs.runtime

    def step(values: list[Any], pointers: list[Any], stream: int) -> None:
        args = [pointers[i] for i in places]
        before, after, metadata = hooks.launch_enter_hook, hooks.launch_exit_hook, None
        if _is_set(before) or _is_set(after):
            metadata = binary.launch_metadata((programs, 1, 1), stream, *args, *others)
        else:
            before = after = None  # an empty chain costs two calls
        if needs_scratch:
            triton.set_allocator(new_scratch)  # a setting of the thread
        start(programs, 1, 1, stream, *options, metadata, before, after, *args, *others)

    return step


def _is_set(hook: Any) -> bool:
    """Whether a profiler listens: hooks are chains, None or functions."""
    return bool(getattr(hook, "calls", hook))


def _allocation_like_step(place: int) -> Step:
    empty_like, contiguous = torch.empty_like, torch.contiguous_format

    def step(values: list[Any], pointers: list[Any], stream: int) -> None:
        result = empty_like(values[place], memory_format=contiguous)
        values.append(result)
        pointers.append(result.data_ptr())

    return step


def _allocation_step(
    size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Step:
    size, empty_strided = tuple(size), torch.empty_strided

    def step(values: list[Any], pointers: list[Any], stream: int) -> None:
        result = empty_strided(size, stride, dtype=dtype, device=device)
        values.append(result)
        pointers.append(result.data_ptr())

    return step


def _call_step(
    func: Any, args: tuple[Any, ...], kwargs: Any, places: list[tuple[int, int]], is_new: bool
) -> Step:
    # Without the tensors, which a plan must not keep alive.
    fixed = [None if isinstance(x, Tensor) else x for x in args]

    def step(values: list[Any], pointers: list[Any], stream: int) -> None:
        now = fixed.copy()
        for i, place in places:
            now[i] = values[place]
        result = func(*now, **kwargs)
        if is_new:
            values.append(result)
            pointers.append(result.data_ptr())

    return step
