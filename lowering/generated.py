"""A module that Inductor generated, loaded with another device and another way to launch kernels.

The interpreter (``tests/generated.py``) and the record of launches (``lowering.fake_gpu``) both run
the wrapper as it stands; only what it takes from CUDA is replaced.
"""

import ast
import collections
import contextlib
import dataclasses
import hashlib
import linecache
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from . import _inductor


@dataclasses.dataclass(frozen=True)
class Config:
    """A tile, its number of warps and of stages; where there are several, a GPU times each."""

    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Triton kernel of a generated module.

    Args:
        name: The function's name, and the module's variable.
        kind: ``template``, ``pointwise``, ``reduction``, ``persistent_reduction``, ...
        fn: What ``triton.jit`` made of the function.
        configs: What the launcher chooses from.
        meta: ``triton_meta``: the signature, and what Triton may assume of each argument.
        inductor_meta: What Inductor knows of it: of this the grid is made.
    """

    name: str
    kind: str
    fn: Any
    configs: tuple[Config, ...]
    meta: dict[str, Any]
    inductor_meta: dict[str, Any]

    @property
    def template(self) -> str | None:
        """Operator and stage of a template of this package, as its text has it; else None."""
        found = re.search(r"# (gdn_\w+):", "".join(self.fn.raw_src))
        return found[1] if found else None

    @property
    def in_place(self) -> set[str]:
        """The tensors among its arguments that it reads and writes."""
        names = set(self.inductor_meta.get("mutated_arg_names", ()))
        names |= {name for name in self.fn.arg_names if name.startswith("in_out")}
        # Inductor keeps no note of what a template writes; its text does.
        found = re.search(r"    # in place: (.+)", "".join(self.fn.raw_src))
        return names | {f"arg_{name}" for name in (found[1].split(", ") if found else ())}

    def bind(self, config: Config, args: Sequence[Any]) -> dict[str, Any]:
        """Name the arguments of a launch; those of the grid, if there are any, come last."""
        # The wrapper passes constants too, but neither a config's nor what it left out as None.
        typed, constants = self.meta["signature"], self.meta["constants"]
        absent = {k for k, v in constants.items() if v is None and k not in typed}
        fixed = absent | config.constants.keys() | {"num_warps", "num_stages"}
        names = [name for name in self.fn.arg_names if name not in fixed]
        names += self.inductor_meta.get("extra_launcher_args", ())
        return dict(zip(names, args, strict=True))

    def grid(self, config: Config, bound: Mapping[str, Any]) -> tuple[int, int, int]:
        """The grid of a launch, by Inductor's own rules."""
        statements, *sizes = _inductor.launcher_grid(self.inductor_meta, config.constants)
        scope = dict(bound)
        exec(statements, scope)
        x, y, z = (int(eval(size, scope)) for size in sizes)
        return x, y, z


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch of a kernel.

    Args:
        kernel: The kernel.
        args: Its arguments by name: numbers, and tensors on ``meta``.
    """

    kernel: Kernel
    args: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class GeneratedModule:
    """What Inductor generates for one graph.

    Args:
        code: Source of the module.
        phase: ``inference``, ``forward`` or ``backward``.
        inputs: The arguments of its ``call``: the caller's own tensors and numbers; None for a
            tensor that he did not give, as what a forward leaves to its backward.
        launches: The launches of Triton kernels that it makes for the example inputs, in order.
        cudagraph_skips: With ``mode="reduce-overhead"``, why CUDA graphs would not be used.
    """

    code: str
    phase: str
    inputs: list[Any] = dataclasses.field(default_factory=list)
    launches: list[Launch] = dataclasses.field(default_factory=list)
    cudagraph_skips: list[str] = dataclasses.field(default_factory=list)

    def record(self, kernel: Kernel, args: Sequence[Any]) -> None:
        bound = kernel.bind(kernel.configs[0], args)
        with unset_fake_temporarily():
            shapes = {
                name: torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
                for name, x in bound.items()
                if isinstance(x, Tensor)
            }
        self.launches.append(Launch(kernel, bound | shapes))


# launcher(kernel, arguments): the arguments are those of the wrapper's call, without the stream.
Launcher = Callable[[Kernel, Sequence[Any]], None]


def load(code: str, launch: Launcher, device: torch.device) -> types.SimpleNamespace:
    """The names of a generated module; its ``call`` takes a list of arguments, and empties it.

    Args:
        code: Source of the module.
        launch: Called where the module launches a Triton kernel.
        device: Where the module allocates, in place of the GPU.
    """
    names = _replacements(launch, device)
    tree = ast.parse(code)
    tree.body = [kept for node in tree.body if (kept := _without(node, names)) is not None]
    tree = ast.fix_missing_locations(_Cuda().visit(tree))
    names["__name__"] = "generated"
    exec(compile(tree, "<generated module>", "exec"), names)
    return types.SimpleNamespace(**names)


def load_kernel(name: str, source: str) -> Kernel:
    """A kernel of a generated module, from its source there."""

    def record(fn: Any, kind: str, configs: list[Any], meta: Any, inductor_meta: Any) -> Kernel:
        choices = (Config(dict(c.kwargs), c.num_warps, c.num_stages) for c in configs)
        return Kernel(name, kind, fn, tuple(choices), meta, inductor_meta)

    # Triton reads the source of a function, which linecache lets it do without a file.
    filename = f"<{name} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {"__name__": f"generated.{name}", "__file__": filename}
    with _inductor.recorded_kernels(record):
        exec(compile(source, filename, "exec"), scope)
    kernel = scope[name]
    assert isinstance(kernel, Kernel)
    return kernel


def kernel_origins(code: str) -> dict[str, tuple[list[str], list[str]]]:
    """What Inductor fused into each kernel: names of the user's operations, and ATen's.

    Without the stage of a template, which is no operation of anybody (``lowering/stages.py``).
    """
    comment = re.compile(
        r"^# Topologically Sorted Source Nodes: \[(?P<nodes>.*)\], "
        r"Original ATen: \[(?P<aten>.*)\]\n(?:#.*\n)*(?P<name>\w+) = async_compile\.",
        re.MULTILINE,
    )
    origins = {}
    for found in comment.finditer(code):
        aten = [x for x in found["aten"].split(", ") if not x.startswith("gdn_stage.")]
        origins[found["name"]] = found["nodes"].split(", "), aten
    return origins


def library_calls(code: str) -> dict[str, int]:
    """What a module calls beside its kernels, and how often: products, and opaque operators."""
    count: collections.Counter[str] = collections.Counter()
    for function in ast.walk(ast.parse(code)):
        if isinstance(function, ast.FunctionDef) and re.match(r"call$|partition_", function.name):
            for node in ast.walk(function):
                if isinstance(node, ast.Call):
                    name = ast.unparse(node.func)
                    if re.match(r"extern_kernels\.|torch\.ops\.|aten\.", name):
                        count[name] += 1
    return dict(count)


def _without(node: ast.stmt, names: Mapping[str, Any]) -> ast.stmt | None:
    """The statement, less what would define one of these names."""
    if isinstance(node, ast.Assign):
        defined = [ast.unparse(target) for target in node.targets]
        return None if any(name in names for name in defined) else node
    if isinstance(node, ast.ImportFrom):
        node.names = [alias for alias in node.names if (alias.asname or alias.name) not in names]
        return node if node.names else None
    return node


class _Cuda(ast.NodeTransformer):
    """``torch.cuda`` in the module's functions is the replacement."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if ast.unparse(node) == "torch.cuda":
            return ast.Name("_cuda", ast.Load())
        self.generic_visit(node)
        return node


def _replacements(launch: Launcher, device: torch.device) -> dict[str, Any]:
    def empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    def reinterpret(x: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
        return x.as_strided(size, stride, x.storage_offset() + offset)

    def as_is(x: Any, *_: Any) -> Any:
        return x

    return {
        "AsyncCompile": lambda: _Kernels(launch),
        "empty_strided_cuda": empty_strided,
        "reinterpret_tensor": reinterpret,
        "copy_if_misaligned": as_is,
        "assert_alignment": as_is,
        "get_raw_stream": as_is,
        "device": lambda *_, **__: device,
        "_cuda": types.SimpleNamespace(
            _DeviceGuard=lambda index: contextlib.nullcontext(),
            set_device=lambda index: None,
            synchronize=lambda: None,
        ),
    }


class _Kernels:
    """In place of ``AsyncCompile``: kernels are loaded, not compiled."""

    def __init__(self, launch: Launcher) -> None:
        self.launch = launch

    def triton(self, name: str, source: str, device_str: str = "cuda") -> types.SimpleNamespace:
        kernel = load_kernel(name, source)

        def run(*args: Any, stream: Any = None) -> None:
            self.launch(kernel, args)

        return types.SimpleNamespace(run=run)

    def wait(self, scope: dict[str, Any]) -> None:
        pass

    def __getattr__(self, kind: str) -> Any:
        raise NotImplementedError(f"generated: kernels must be Triton's, got one of {kind!r}")
