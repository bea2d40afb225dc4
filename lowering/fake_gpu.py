"""The code that torch.compile generates for a GPU that this machine does not have.

    modules = generate(model, (x,), arch="sm_90")
    print(modules[0].code)

The whole path of ``torch.compile`` runs, up to the point where the generated module would be
imported: its inputs are fake tensors on a CUDA device, whose properties ``fake_gpu`` makes up.
Nothing is compiled to machine code and no data is read; ``lowering.sass`` does the former.
"""

import contextlib
import copy
import copyreg
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import convert_frame
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from . import _inductor
from .arch import Arch, find_arch
from .generated import GeneratedModule, load

CUDA = torch.device("cuda", 0)


class _OnCpu(TorchDispatchMode):
    """Values that Inductor computes while it compiles are computed on the CPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cpu = torch.device("cpu")
        moved = tree_map_only(torch.device, lambda _: cpu, (args, kwargs or {}))
        return func(*moved[0], **moved[1])


@contextlib.contextmanager
def fake_gpu(arch: str = "sm_90") -> Iterator[Arch]:
    """Let torch believe that it has one GPU; afterwards everything is as it was.

    Inside, fake tensors on ``cuda`` can be made, and compiled for by ``generate``; nothing can
    run. Not for use beside a real GPU or from several threads.

    Args:
        arch: ``sm_80``, ``sm_89``, ``sm_90``, ``sm_100`` or ``gfx942``.

    Raises:
        ValueError: ``arch`` is none of these.
        RuntimeError: torch is a CPU build and there is no C++ compiler.
    """
    gpu = find_arch(arch)
    _inductor.initialise_passes()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_cuda_guard())
        for owner, names in _patches(gpu):
            for name, value in names.items():
                if hasattr(owner, name):
                    stack.enter_context(mock.patch.object(owner, name, value))
        # Asked of the allocator before CUDA graphs are used; a CPU build has none.
        stack.enter_context(
            mock.patch.object(
                torch._C, "_cuda_cudaCachingAllocator_is_enabled", create=True, return_value=True
            )
        )
        stack.enter_context(_triton_driver(gpu))
        stack.enter_context(_inductor.fake_device(_OnCpu))
        yield gpu


def _patches(gpu: Arch) -> list[tuple[Any, dict[str, Any]]]:
    """What is replaced: (owner, {name: value}); a name that a release of torch lacks is skipped."""
    from torch._dynamo.device_interface import CudaInterface

    properties = types.SimpleNamespace(**gpu.device_properties())
    queries: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "memory_allocated": lambda device=None: 0,
    }
    exchange = {name: lambda index: 0 for name in ("exchange_device", "maybe_exchange_device")}
    interface = queries | exchange
    interface["set_device"] = lambda device: None
    module = queries | {f"_{name}": function for name, function in exchange.items()}
    module["get_device_capability"] = lambda device=None: (gpu.major, gpu.minor)
    module["get_device_name"] = lambda device=None: gpu.device
    module["_lazy_init"] = lambda: None
    # torch 2.14 asks before it traces a frame, of the driver.
    module["is_current_stream_capturing"] = lambda: False
    module["get_rng_state"] = lambda device=None: torch.empty(16, dtype=torch.uint8)
    module["set_rng_state"] = lambda state, device=None: None
    return [
        (torch.cuda, module),
        (torch.version, {"cuda": None, "hip": "6.4"} if gpu.is_amd else {"cuda": "13.0"}),
        (CudaInterface, {name: staticmethod(f) for name, f in interface.items()}),
        (
            CudaInterface.Worker,
            {
                name: staticmethod(queries[name])
                for name in ("current_device", "get_device_properties")
            },
        ),
    ]


@contextlib.contextmanager
def _triton_driver(gpu: Arch) -> Iterator[None]:
    """A driver that knows its target, and can launch nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    fake = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget(*gpu.target),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: CUDA,
        get_device_interface=lambda: torch.cuda,
    )
    before = {name: getattr(driver, name) for name in vars(driver)}
    driver.set_active(fake)
    try:
        yield
    finally:
        vars(driver).update(before)


@contextlib.contextmanager
def _cuda_guard() -> Iterator[None]:
    from torch._subclasses import fake_tensor

    try:
        library = _guard_library()
    except RuntimeError:
        if not torch.backends.cuda.is_built():
            raise
        # A CUDA build has a guard, which torch makes idle where there is no GPU: enough as long as
        # autograd has nothing to do.
        torch._C._ensureCUDADeviceGuardSet()
        library = None
    with mock.patch.object(fake_tensor, "init_gpu_context"):
        if library is not None:
            library.lend_cuda()
        try:
            yield
        finally:
            if library is not None:
                library.take_cuda_back()


@functools.cache
def _guard_library() -> ctypes.CDLL:
    source = Path(__file__).with_name("noop_cuda_guard.cpp")
    key = hashlib.sha256(f"{torch.__version__} {source.read_text()}".encode()).hexdigest()[:16]
    library = _user_cache() / f"noop_cuda_guard-{key}.so"
    if not library.exists():
        _compile(source, library)
    return ctypes.CDLL(str(library))


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gdn-ops"


def _compile(source: Path, library: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError(
            "fake_gpu: a CPU build of torch needs a C++ compiler once, got none; install g++, or"
            " set CXX"
        )
    root = Path(torch.__file__).parent
    library.parent.mkdir(parents=True, exist_ok=True)
    # Compiled beside its place and moved there, so that nobody loads half a file.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [
            *compiler.split(),
            *("-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}"),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            *(str(source), "-o", str(built), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(
                f"fake_gpu: {compiler} must compile {source.name}, got {done.stderr}"
            )
        built.replace(library)


def generate(
    target: Callable[..., Any],
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    arch: str = "sm_90",
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[GeneratedModule]:
    """The modules that ``torch.compile(target)`` generates for a GPU, one for each graph.

    Of the inputs only shapes, strides and dtypes are read: tensors on the CPU or on ``meta`` will
    do. They, and the tensors of a module, of a bound method's object or of a
    ``functools.partial``, become fake tensors on the GPU, and a ``torch.device`` in such an object
    becomes the GPU; what is in a closure does not.
    ``torch._dynamo.mark_dynamic`` and ``mark_static_address`` are respected, and so is sharing of
    memory between tensors. Where a result requires a gradient, the backward is generated too.

    Args:
        target: A function or a module.
        example_inputs: Its positional arguments.
        example_kwargs: Its keyword arguments. Default: none.
        arch: As for ``fake_gpu``.
        mode: As for ``torch.compile``; ``"reduce-overhead"`` fills ``cudagraph_skips``. The modes
            that measure need a GPU. Default: None.
        dynamic: As for ``torch.compile``. Default: what is marked dynamic.
        fullgraph: As for ``torch.compile``. Default: True, a graph break is an error.
        options: Settings of Inductor, as for ``torch.compile``. Default: none.

    Returns:
        The modules, in the order in which they were compiled.

    Raises:
        ValueError: ``mode`` is one that measures, or ``arch`` is not known.
    """
    if mode not in (None, "default", "reduce-overhead"):
        raise ValueError(
            f"generate: mode must be None, 'default' or 'reduce-overhead', since the others need a"
            f" GPU to measure on, got {mode!r}"
        )
    settings = dict(options or {})
    if mode == "reduce-overhead":
        settings["triton.cudagraphs"] = True
    modules: list[GeneratedModule] = []
    origins: dict[Any, Tensor] = {}

    with (
        fake_gpu(arch),
        _forgetful_dynamo(),
        _inductor.capture(
            settings,
            lambda code, phase: _taken(modules, origins, code, phase),
            lambda why: modules[-1].cudagraph_skips.append(why),
        ),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        tree = (target, tuple(example_inputs), dict(example_kwargs or {}))
        moved, args, kwargs = _move(tree, origins)
        call = _forgettable(moved)
        outputs = torch.compile(call, fullgraph=fullgraph, dynamic=dynamic)(*args, **kwargs)
        _run_backward(outputs)
    return modules


def _taken(
    modules: list[GeneratedModule], origins: dict[Any, Tensor], code: str, phase: str
) -> types.SimpleNamespace:
    """Keep a generated module; what stands for it notes its inputs and launches as it is called."""
    # Comments that differ from run to run: a number, and files that are not written.
    code = re.sub(r"^# (AOT ID|kernel path): .*\n", "", code, flags=re.MULTILINE)
    module = GeneratedModule(code, phase)
    modules.append(module)
    loaded = load(code, module.record, CUDA)

    def call(args: list[Any]) -> Any:
        if not module.inputs:
            module.inputs.extend(
                origins.get(_place(x)) if isinstance(x, Tensor) else x for x in args
            )
        return loaded.call(args)

    return types.SimpleNamespace(call=call, runner=getattr(loaded, "runner", None))


@contextlib.contextmanager
def _forgetful_dynamo() -> Iterator[None]:
    """Dynamo keeps nothing of what it compiles inside, and learns nothing from it."""
    seen = set(convert_frame.input_codes.seen)
    settings = {"automatic_dynamic_shapes": False, "automatic_dynamic_local_pgo": False}
    with (
        torch._dynamo.config.patch(settings),
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch.autograd.set_multithreading_enabled(False),
        warnings.catch_warnings(),
    ):
        # A hint for the user's own machine.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        try:
            yield
        finally:
            for reference in set(convert_frame.input_codes.seen) - seen:
                code = reference() if isinstance(reference, weakref.ref) else reference
                if code is not None:
                    reset_code(code)


def _forgettable(target: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a code object of its own: Dynamo keeps what it compiles by code object."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


def _run_backward(outputs: Any) -> None:
    """The backward is compiled when it first runs, which fake gradients can do."""
    results = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.grad_fn is not None]
    if results:
        torch.autograd.backward(results, [torch.empty_like(x) for x in results])


def _place(x: Tensor) -> Any:
    """What tells a fake tensor from every other: its memory, and its place there."""
    return x.untyped_storage()._cdata, x.size(), x.stride(), x.storage_offset(), x.dtype


def _move(tree: Any, origins: dict[Any, Tensor]) -> Any:
    """A deep copy in which each tensor is a fake one on the GPU; storages stay shared.

    ``origins`` will have the tensor of which each is a copy, by the place of the fake one.
    """
    owners: dict[tuple[Any, torch.dtype], Tensor] = {}

    def fake_storage_of(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        last = sum((n - 1) * stride for n, stride in zip(x.size(), x.stride(), strict=True))
        extent = (last + 1) * x.itemsize if x.numel() else 0
        whole = x.storage_offset() == 0 and extent == storage.nbytes()
        key = (storage._cdata, x.dtype)
        if key not in owners:
            owners[key] = (
                torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=CUDA)
                if whole
                else torch.empty(storage.nbytes() // x.itemsize, dtype=x.dtype, device=CUDA)
            )
        return owners[key]

    def fake_copy(x: Tensor, memo: dict[int, Tensor]) -> Tensor:
        if id(x) in memo:
            return memo[id(x)]
        fake = fake_storage_of(x)
        layout = (x.size(), x.stride(), x.storage_offset())
        if (fake.size(), fake.stride(), fake.storage_offset()) != layout:
            fake = fake.as_strided(*layout)
        if isinstance(x, torch.nn.Parameter):
            fake = torch.nn.Parameter(fake, x.requires_grad)
        elif x.requires_grad:
            fake = fake.detach().requires_grad_()
        # What mark_dynamic, mark_static_address and their kin left on the tensor.
        for name, value in vars(x).items():
            if name.startswith("_dynamo_"):
                setattr(fake, name, copy.copy(value))
        origins[_place(fake)] = x
        memo[id(x)] = fake
        return fake

    with (
        # An object may keep beside its tensors the device that they are on, as caches do.
        mock.patch.dict(
            copyreg.dispatch_table, {torch.device: lambda _: (torch.device, (str(CUDA),))}
        ),
        mock.patch.object(Tensor, "__deepcopy__", fake_copy),
        mock.patch.object(torch.nn.Parameter, "__deepcopy__", fake_copy),
    ):
        return copy.deepcopy(tree)
