"""The kernels that a model would get on a GPU that nobody here owns.

    python -m lowering.inspect examples/inspect_layer.py:decode batch=64 --arch sm_90
    python -m lowering.inspect examples/generate.py -- --tokens 8

prints for each graph its kernels, what Inductor fused into each, and what the compiler made of it:
of a factory's model, or of all that a script compiles.
"""

import argparse
import ast
import collections
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .arch import ARCHS, find_arch
from .fake_gpu import fake_gpu, generate
from .generated import GeneratedModule, Kernel, Launch, kernel_origins, library_calls
from .inspect_report import print_report
from .inspect_script import ScriptError, captured_graphs, require_script
from .sass import compile_generated

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """A kernel of a graph.

    Args:
        name: Its name in the generated module.
        kind: ``template``, ``pointwise``, ``reduction``, ``persistent_reduction``, ...
        template: Of a template of ours, its operator and stage, as ``gdn_chunk_scan``; else None.
        launches: How often the graph launches it.
        fused: Operations of ATen, and templates, that it does the work of.
        sources: Names of the values in the user's graph that it computes.
        bytes: Bytes of the tensors of one launch, those that are read and written counted twice: at
            least so much memory is moved, except where the kernel picks rows from a table or pool.
        configs: Configurations that a GPU would choose from; what follows is of the first.
        num_warps: Warps of a block.
        num_stages: Stages of software pipelines.
        registers: 32-bit registers of a thread; as the rest None where it does not compile.
        spills: Accesses to local memory in its code.
        shared: Shared memory of a block, bytes.
        occupancy: Blocks that fit a multiprocessor at a time.
        error: Why it does not compile.
    """

    name: str
    kind: str
    template: str | None
    launches: int
    fused: list[str]
    sources: list[str]
    bytes: int
    configs: int
    num_warps: int
    num_stages: int
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    occupancy: int | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """A graph.

    Args:
        phase: ``inference``, ``forward`` or ``backward``.
        kernels: Its Triton kernels.
        calls: Calls of libraries and of operators without a lowering, and how often.
        cudagraph_skips: Why CUDA graphs would not be used, with ``mode="reduce-overhead"``.
        code: The generated module.
    """

    phase: str
    kernels: list[KernelReport]
    calls: dict[str, int]
    cudagraph_skips: list[str]
    code: str = dataclasses.field(repr=False)


def inspect(
    factory: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]],
    *,
    arch: str = "sm_90",
    dtype: torch.dtype | None = None,
    mode: str | None = None,
    fullgraph: bool = True,
) -> list[GraphReport]:
    """The kernels that ``torch.compile`` makes of a model for a GPU that need not be there.

    Under ``torch.no_grad`` there is no backward.

    Args:
        factory: Returns a function or module, and its positional arguments: on the CPU, or on
            ``meta``, which takes no memory.
        arch: ``sm_80``, ``sm_89``, ``sm_90``, ``sm_100`` or ``gfx942``. Default: ``sm_90``.
        dtype: Convert parameters and floating arguments of at least 2 dimensions. Default: as they
            are.
        mode: As for ``lowering.fake_gpu.generate``. Default: None.
        fullgraph: False allows graph breaks. Default: True.

    Raises:
        ValueError: ``arch`` is not known, or ``mode`` is one that measures.
        RuntimeError: torch is a CPU build and there is no C++ compiler, or TRITON_INTERPRET=1.
    """
    _require_compiler(arch)
    target, args = factory()
    return _reports(target, args, arch, dtype, mode, fullgraph)


def inspect_script(
    script: Path,
    argv: Sequence[str] = (),
    *,
    arch: str = "sm_90",
    dtype: torch.dtype | None = None,
    mode: str | None = None,
) -> list[GraphReport]:
    """The same of every graph that a script compiles while it runs, on the CPU.

    Args:
        script: The script.
        argv: Its arguments. Default: none.
        arch: As for ``inspect``.
        dtype: As for ``inspect``, of the inputs of a graph, parameters among them.
        mode: As for ``inspect``. Default: the script's, where that is one of CUDA graphs.

    Raises:
        ValueError: as for ``inspect``; a ``ScriptError`` where there is no such script, it compiles
            nothing, or it fails.
        RuntimeError: as for ``inspect``.
    """
    _require_compiler(arch)
    graphs = []
    for found in captured_graphs(script, argv):
        with torch.set_grad_enabled(found.is_grad_enabled):
            graphs += _reports(found.graph, found.inputs, arch, dtype, mode or found.mode, True)
    return graphs


def _require_compiler(arch: str) -> None:
    """Raise before anything is run where nothing can be compiled."""
    find_arch(arch)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("inspect: TRITON_INTERPRET must be unset to compile kernels, got 1")


def _reports(
    target: Any, args: Any, arch: str, dtype: torch.dtype | None, mode: str | None, fullgraph: bool
) -> list[GraphReport]:
    if dtype is not None:
        target, args = _converted(target, args, dtype)
    modules = generate(target, args, arch=arch, mode=mode, fullgraph=fullgraph)
    return [_graph_report(module, arch) for module in modules]


def _converted(target: Any, args: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    if isinstance(target, torch.nn.Module):
        target = target.to(dtype)

    def convert(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dim() > 1 else x

    return target, tree_map_only(Tensor, convert, args)


def _graph_report(module: GeneratedModule, arch: str) -> GraphReport:
    origins = kernel_origins(module.code)
    launches = collections.Counter(launch.kernel.name for launch in module.launches)
    first = {launch.kernel.name: launch for launch in reversed(module.launches)}
    kernels = [
        _kernel_report(first[name], count, origins.get(name, ([], [])), arch)
        for name, count in launches.items()
    ]
    calls = library_calls(module.code)
    return GraphReport(module.phase, kernels, calls, module.cudagraph_skips, module.code)


def _kernel_report(
    launch: Launch, launches: int, origin: tuple[list[str], list[str]], arch: str
) -> KernelReport:
    kernel = launch.kernel
    config = kernel.configs[0]
    report = KernelReport(
        name=kernel.name,
        kind=kernel.kind,
        template=kernel.template,
        launches=launches,
        fused=origin[1],
        sources=origin[0],
        bytes=_bytes(kernel, launch.args),
        configs=len(kernel.configs),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    from triton.compiler.errors import TritonError

    try:
        facts = compile_generated(kernel, config, arch)
    except TritonError as error:
        return dataclasses.replace(report, error=str(error).strip().splitlines()[-1])
    return dataclasses.replace(
        report,
        registers=facts.registers,
        spills=facts.spills,
        shared=facts.shared,
        occupancy=facts.occupancy,
    )


def _bytes(kernel: Kernel, args: Mapping[str, Any]) -> int:
    total = 0
    for name, x in args.items():
        if isinstance(x, Tensor):
            # A dimension of stride 0 is one element in memory.
            sizes = [n for n, stride in zip(x.size(), x.stride(), strict=True) if stride]
            total += math.prod(sizes) * x.itemsize * (2 if name in kernel.in_place else 1)
    return total


def find_factory(target: str) -> Callable[[], Any]:
    """The factory that ``path/to/script.py:name`` or ``package.module:name`` names.

    Raises:
        ValueError: there is none.
    """
    place, _, name = target.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(
            "inspect: TARGET must be path/to/script.py, path/to/script.py:factory or"
            f" package.module:factory, got {target!r}"
        )
    module = _load_script(Path(place)) if place.endswith(".py") else _import(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ValueError(f"inspect: {place} must define the function {name}, got {factory!r}")
    return factory  # type: ignore[no-any-return]


def with_arguments(factory: Callable[..., Any], given: Sequence[str]) -> Callable[[], Any]:
    """``factory`` with its arguments, each ``name=value``, a number or another literal.

    Raises:
        ValueError: one has no such form, or the factory does not take it.
    """
    pairs = [text.partition("=") for text in given]
    try:
        arguments = {name: ast.literal_eval(value) for name, _, value in pairs}
        signature(factory).bind(**arguments)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"inspect: NAME=VALUE must be an argument of the factory, {signature(factory)}, got"
            f" {' '.join(given)!r}: {error}"
        ) from None
    return functools.partial(factory, **arguments)


def _load_script(path: Path) -> Any:
    require_script(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    # A script finds its neighbours, as if it were run.
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"inspect: TARGET must name a module, got {name!r}: {error}") from None


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lowering.inspect",
        description="Show the kernels that torch.compile makes of a model for a GPU that is not"
        " here.",
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="path/to/script.py, which is run; or path/to/script.py:factory or"
        " package.module:factory, where factory() returns a module or function, and its example"
        " inputs, on the CPU or on meta",
    )
    parser.add_argument(
        "arguments",
        metavar="NAME=VALUE",
        nargs="*",
        help="arguments of the factory, such as the sizes of its inputs; of a script its own,"
        " after --",
    )
    parser.add_argument("--arch", default="sm_90", help=f"one of {', '.join(ARCHS)} (sm_90)")
    parser.add_argument("--dtype", choices=DTYPES, help="convert parameters and inputs")
    parser.add_argument(
        "--mode", choices=["default", "reduce-overhead"], help="the latter tells what would skip it"
    )
    parser.add_argument("--graph-breaks", action="store_true", help="allow graph breaks")
    parser.add_argument("--no-grad", action="store_true", help="inference only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--code", action="store_true", help="print the generated modules too")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        # Triton read it when it was imported, so nothing can be compiled in this process.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "lowering.inspect", *(argv or sys.argv[1:])]
        return subprocess.run(command, env=environment).returncode
    chosen = {"arch": options.arch, "dtype": DTYPES.get(options.dtype), "mode": options.mode}
    is_script = options.target.endswith(".py")
    run: Callable[[], list[GraphReport]]
    try:
        if is_script:
            run = functools.partial(inspect_script, Path(options.target), options.arguments)
        else:
            factory = with_arguments(find_factory(options.target), options.arguments)
            run = functools.partial(inspect, factory, fullgraph=not options.graph_breaks)
        with fake_gpu(options.arch):  # it raises where it cannot be had
            pass
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    with torch.no_grad() if options.no_grad else contextlib.nullcontext():
        try:
            graphs = run(**chosen)
        except ScriptError as error:
            print(error, file=sys.stderr)
            return 2
    if options.json:
        print(json.dumps([_as_json(graph, options.code) for graph in graphs], indent=2))
    else:
        print_report(graphs, find_arch(options.arch), options.code)
    return 0


def _as_json(graph: GraphReport, with_code: bool) -> dict[str, Any]:
    record = dataclasses.asdict(graph)
    if not with_code:
        del record["code"]
    return record


if __name__ == "__main__":
    sys.exit(main())
