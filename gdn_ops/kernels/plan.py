"""Plans: what a launching function does for one kind of call, noted once and then done without it.

A launching function reads shapes, strides, dtypes, devices and flags, never data. So two calls that
agree in these, and in which pointers are multiples of 16 bytes, allocate the same tensors and
launch the same binaries with the same numbers; only the pointers differ. Working all that out takes
ten times as long as the launch: a decode step does it once.

What only kernels see, their scratch included, a plan takes from one block of memory: an allocation
costs the host about as much as a launch.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from gdn_ops._allocate import Allocator

# step(values, addresses, stream, is_watched): values and addresses have the same places, of which
# the first is None, for what is absent. Hooks of Triton are called where a profiler watches.
Step = Callable[[list[Any], list[Any], int, bool], None]

# Between tensors of a block, as between those of torch's allocator.
_ALIGNMENT = 512


class Allocation(NamedTuple):
    """A tensor to allocate."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes from its first element to its last."""
        if 0 in self.size:
            return 0
        last = sum((n - 1) * stride for n, stride in zip(self.size, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


class Launch(NamedTuple):
    """A kernel to start. Places are those of its scratch and of its tensors."""

    binary: Any
    programs: int
    scratch: int
    places: tuple[int, ...]
    others: tuple[Any, ...]


class Call(NamedTuple):
    """A function of torch to call, with the places of its tensors by argument."""

    func: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    places: dict[int, int]
    result: int | None


class Plan:
    """What a call allocates, its steps, and which values it returns.

    Places are, in this order: None, a piece of the block for each of ``pieces``, the arguments, a
    tensor for each of ``tensors``, and the results of ``calls`` calls of torch.
    """

    def __init__(
        self,
        pieces: Sequence[Allocation],
        tensors: Sequence[Allocation],
        calls: int,
        steps: tuple[Step, ...],
        results: int | tuple[int, ...],
        device: torch.device,
    ):
        rooms = [-(-x.nbytes // _ALIGNMENT) * _ALIGNMENT for x in pieces]
        self._offsets = [sum(rooms[:i]) for i in range(len(rooms))]
        self._block = Allocation((sum(rooms),), (1,), torch.uint8) if rooms else None
        self._tensors, self._calls, self._steps = tensors, [None] * calls, steps
        self._results = (
            _items(results) if isinstance(results, tuple) else operator.itemgetter(results)
        )
        self._absent = [None] * (1 + len(pieces))
        self._current_device = driver.active.get_current_device
        self._current_stream = driver.active.get_current_stream
        self._device = self._current_device()
        self._allocator = Allocator(device)

    def __call__(self, tensors: Sequence[Tensor], pointers: list[int]) -> Any:
        """Do the steps on the current stream.

        Args:
            tensors: The arguments that are not None.
            pointers: Their addresses.
        """
        device = self._device
        if self._current_device() != device:
            with torch.cuda.device(device):
                return self(tensors, pointers)
        empty = self._allocator.find()
        values: list[Any] = [*self._absent, *tensors]
        addresses: list[Any] = [None]
        block = self._block
        if block is not None:
            memory = empty(*block)  # in use until this function returns, then by the same stream
            start = memory.data_ptr()
            addresses += [start + offset for offset in self._offsets]
        addresses += pointers
        for size, stride, dtype in self._tensors:
            x = empty(size, stride, dtype)
            values.append(x)
            addresses.append(x.data_ptr())
        values += self._calls
        addresses += self._calls
        stream, is_watched = self._current_stream(device), _is_watched()
        for step in self._steps:
            step(values, addresses, stream, is_watched)
        return self._results(values)


def _items(places: tuple[int, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """``(x[places[0]], x[places[1]], ...)`` of ``x``."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda x: tuple([x[i] for i in places])


def new_scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the tensor descriptors that a kernel makes: an allocator for Triton."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


class Scratch:
    """The same for kernels that run beside each other: memory that is kept as long as this is.

    What Triton itself gets for one launch is free when that returns, and may be what the next gets.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def __call__(self, size: int, alignment: int, stream: int | None) -> Tensor:
        self._kept.append(new_scratch(size, alignment, stream))
        return self._kept[-1]


def scratch_size(binary: Any, programs: int) -> int:
    """Bytes of the memory that Triton asks an allocator for."""
    metadata = binary.metadata
    size = getattr(metadata, "global_scratch_size", 0) or 0
    return int(size) * programs * (getattr(metadata, "num_ctas", 1) or 1)


def takes_scratch(binary: Any) -> bool:
    """Whether a launch calls the C function that ``JITFunction.run`` calls in the end.

    There is a Python class around it, which allocates scratch and takes 1 us of a launch's 2.3.
    Its arguments are those of Triton 3.6 and 3.7; another version is launched by the class.
    """
    is_profiled = getattr(binary.metadata, "profile_scratch_size", 0)
    return _version() in _DIRECT and torch.version.hip is None and not is_profiled


def _version() -> str:
    return ".".join(triton.__version__.split(".")[:2])


def make_step(x: Launch | Call, places: dict[int, int]) -> Step:
    """The step for what was noted at other places."""
    if isinstance(x, Call):
        result = None if x.result is None else places[x.result]
        moved = {i: places[place] for i, place in x.places.items()}
        return _call_step(x._replace(places=moved, result=result))
    moved_places = tuple([places[i] for i in x.places])
    x = x._replace(scratch=places[x.scratch], places=moved_places)
    return (_DIRECT[_version()] if takes_scratch(x.binary) else _launch_step)(x)


def _launch_step_3_6(launch: Launch) -> Step:
    binary, programs, scratch, places, others = launch
    start, function, packed_metadata = binary.run.launch, binary.function, binary.packed_metadata
    modes = (binary.run.launch_cooperative_grid, binary.run.launch_pdl)
    tensors = _items(places)

    def step(values: list[Any], addresses: list[Any], stream: int, is_watched: bool) -> None:
        args = tensors(addresses)
        hooks = _hooks(launch, stream, args) if is_watched else _NO_HOOKS
        memory = (addresses[scratch], None, packed_metadata)
        start(programs, 1, 1, stream, function, *modes, *memory, *hooks, *args, *others)

    return step


def _launch_step_3_7(launch: Launch) -> Step:
    binary, programs, scratch, places, others = launch
    run, start, function = binary.run, binary.run.launch, binary.function
    modes = (run.launch_cooperative_grid, run.launch_pdl, binary.packed_metadata)
    kinds = (run.arg_annotations, run.kernel_signature)
    tensors = _items(places)

    def step(values: list[Any], addresses: list[Any], stream: int, is_watched: bool) -> None:
        args = tensors(addresses)
        hooks = _hooks(launch, stream, args) if is_watched else _NO_HOOKS
        memory = (addresses[scratch], None)
        start(programs, 1, 1, stream, function, *modes, *hooks, *memory, *kinds, (*args, *others))

    return step


# By version of Triton. Each passes what its CudaLauncher passes (tests/test_launch.py).
_DIRECT = {"3.6": _launch_step_3_6, "3.7": _launch_step_3_7}


def _launch_step(launch: Launch) -> Step:
    binary, programs, _, places, others = launch
    start, options = binary.run, (binary.function, binary.packed_metadata)
    tensors, has_scratch = _items(places), scratch_size(binary, programs) > 0

    def step(values: list[Any], addresses: list[Any], stream: int, is_watched: bool) -> None:
        args = tensors(addresses)
        hooks = _hooks(launch, stream, args) if is_watched else _NO_HOOKS
        if has_scratch:
            triton.set_allocator(new_scratch)  # a setting of the thread
        start(programs, 1, 1, stream, *options, *hooks, *args, *others)

    return step


# What a launch is given for a profiler: an empty chain would cost two calls.
_NO_HOOKS = (None, None, None)


def _hooks(launch: Launch, stream: int, args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    grid = (launch.programs, 1, 1)
    metadata = launch.binary.launch_metadata(grid, stream, *args, *launch.others)
    return metadata, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook


def _is_watched() -> bool:
    """Whether a profiler listens: hooks are chains, None or functions."""
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def _call_step(call: Call) -> Step:
    func, args, keywords, places, place = call

    def step(values: list[Any], addresses: list[Any], stream: int, is_watched: bool) -> None:
        now = list(args)
        for i, x in places.items():
            now[i] = values[x]
        result = func(*now, **keywords)
        if place is not None:
            values[place] = result
            addresses[place] = result.data_ptr()

    return step
