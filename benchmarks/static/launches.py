"""What the launching functions launch on a GPU that is not there, and what that is compiled to.

The launching functions themselves run, on tensors without memory: only Triton's last step, which
compiles for the GPU at hand, is replaced by a record. So tiles, warps, flags and what is taken to
be aligned are the launchers' own choice.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdn_ops.kernels.configs import gpu_at
from lowering.arch import find_arch
from lowering.sass import Facts, compile_kernel

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
# What torch does without a launch, beside views.
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, and all that Triton would compile it for.

    Args:
        fn: The kernel, a ``triton.jit`` function.
        args: Its arguments by name.
        num_warps: Warps of a program; of its first role where warps have roles.
        num_stages: Stages of its loops' pipelines.
        programs: Programs of the launch.
        options: Further options of Triton's back end.
    """

    fn: Any
    args: dict[str, Any]
    num_warps: int
    num_stages: int
    programs: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def kernel(self) -> str:
        return str(self.fn.__name__).removesuffix("_kernel")

    def with_config(self, config: Any) -> "Launch":
        """The same with another choice of the lowering's."""
        return dataclasses.replace(
            self,
            args=self.args | dict(config.tiles),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def signature(self) -> tuple[dict[str, str], dict[str, Any], list[str]]:
        """Types, constants and arguments divisible by 16, by the rules of Triton's launcher."""
        typed, constants, divisible = {}, {}, []
        for parameter in self.fn.params:
            name, x = parameter.name, self.args[parameter.name]
            if isinstance(x, torch.Tensor):
                typed[name] = TYPES[x.dtype]
                x = x.storage_offset() * x.itemsize
            elif parameter.is_constexpr or x is None or x == 1:
                constants[name] = x
                continue
            else:
                typed[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
            divisible += [name] * (x % 16 == 0)
        return typed, constants, divisible

    def compile(self, arch: str) -> Facts:
        """What it becomes; what was compiled before for another size is not compiled again."""
        typed, constants, divisible = self.signature()
        return _compile(
            self.fn,
            tuple(typed.items()),
            tuple(constants.items()),
            tuple(divisible),
            self.num_warps,
            self.num_stages,
            tuple(self.options.items()),
            arch,
        )


@functools.cache
def _compile(
    fn: Any,
    typed: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    divisible: tuple[str, ...],
    num_warps: int,
    num_stages: int,
    options: tuple[tuple[str, Any], ...],
    arch: str,
) -> Facts:
    return compile_kernel(
        fn,
        dict(typed),
        dict(constants),
        arch=arch,
        num_warps=num_warps,
        num_stages=num_stages,
        divisible=divisible,
        options=dict(options),
    )


@dataclasses.dataclass(frozen=True)
class TorchLaunch:
    """What torch itself launches between the kernels.

    Args:
        name: Its operator.
        tensors: What it reads and writes.
    """

    name: str
    tensors: tuple[torch.Tensor, ...]


class _TorchLaunches(TorchDispatchMode):
    def __init__(self, found: list[Launch | TorchLaunch]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in ALLOCATIONS:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            tensors = tuple({id(x): x for x in (*given, *made)}.values())
            self.found.append(TorchLaunch(func.overloadpacket.__name__, tensors))
        return result


def record(call: Callable[[], object], arch: str) -> list[Launch]:
    """The kernels that ``call()`` launches where the GPU at hand is of this architecture."""
    return [launch for launch in record_all(call, arch) if isinstance(launch, Launch)]


def record_all(call: Callable[[], object], arch: str) -> list[Launch | TorchLaunch]:
    """The same with what torch launches between them, in order."""
    import triton
    from triton.runtime.jit import JITFunction

    from gdn_ops.kernels import chunk

    found: list[Launch | TorchLaunch] = []

    def run(
        fn: Any,
        *args: Any,
        grid: tuple[int, ...],
        warmup: bool,
        num_warps: int,
        num_stages: int,
        **constants: Any,
    ) -> None:
        # Of what may be absent, constants come by name.
        named = dict(zip(fn.arg_names, args, strict=False)) | constants
        options = {name: named.pop(name) for name in constants if name not in fn.arg_names}
        found.append(Launch(fn, named, num_warps, num_stages, grid[0], options))

    gpu = find_arch(arch)
    properties = types.SimpleNamespace(**gpu.device_properties())
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.version, "hip", "6.4" if gpu.is_amd else None),
        mock.patch.object(chunk, "_gpu_at", return_value=gpu_at(0)),
        mock.patch.object(triton, "set_allocator"),
        _TorchLaunches(found),
    ):
        call()
    return found
