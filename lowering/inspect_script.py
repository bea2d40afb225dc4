"""What a script compiles, for ``lowering.inspect``: the script runs, and its graphs are kept.

Each graph that Dynamo hands to Inductor runs as it is, so that the script gets its results, and is
then compiled for the GPU that is not there.
"""

import contextlib
import copy
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

# Functions of torch that make a tensor, on the CPU where they are not told.
FACTORIES = {
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices"),
    "zeros",
}


class ScriptError(ValueError):
    """A script that there is nothing to see of; its text is the reason."""


class Captured(NamedTuple):
    """A graph that a script compiled.

    Args:
        graph: The function, of tensors and numbers.
        inputs: Its inputs, on meta.
        mode: The script's ``mode`` of ``torch.compile``, where that is one of CUDA graphs.
        is_grad_enabled: Whether a backward was to follow.
    """

    graph: torch.fx.GraphModule
    inputs: tuple[Any, ...]
    mode: str | None
    is_grad_enabled: bool


def require_script(path: Path) -> None:
    """Raise ``ScriptError`` where there is no such file."""
    if not path.is_file():
        raise ScriptError(f"inspect: TARGET must name a script that exists, got {str(path)!r}")


def captured_graphs(script: Path, argv: Sequence[str] = ()) -> list[Captured]:
    """Run ``script`` with these arguments; return what it compiled with Inductor, in that order.

    Raises:
        ScriptError: there is no such file, it compiled nothing, or its exit code is not 0.
    """
    require_script(script)
    found: list[Captured] = []
    # A script finds its neighbours.
    paths = [str(script.parent), *sys.path]
    with (
        mock.patch.object(torch, "compile", _capturing(found)),
        # A number stays one: as a tensor it would be of unknown value in the second compile.
        torch._dynamo.config.patch(specialize_float=True),
        mock.patch.object(sys, "argv", [str(script), *argv]),
        mock.patch.object(sys, "path", paths),
        contextlib.redirect_stdout(sys.stderr),  # the standard output is the report's
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as error:
            if error.code not in (None, 0):
                raise ScriptError(f"inspect: {script} ended with {error.code!r}") from None
    if not found:
        raise ScriptError(f"inspect: {script} must call torch.compile, and what that returns")
    return found


def _capturing(found: list[Captured]) -> Any:
    """``torch.compile`` that keeps what it would give to Inductor."""
    compile_ = torch.compile

    def compile_and_keep(
        model: Any = None, *, backend: Any = "inductor", mode: str | None = None, **settings: Any
    ) -> Any:
        if backend != "inductor":
            return compile_(model, backend=backend, mode=mode, **settings)
        settings.pop("options", None)
        kept_mode = "reduce-overhead" if mode in ("reduce-overhead", "max-autotune") else None

        def keep(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
            described = tuple([_described(x) for x in inputs])
            found.append(Captured(_on_gpu(graph), described, kept_mode, torch.is_grad_enabled()))
            return graph.forward

        return compile_(model, backend=keep, **settings)

    return compile_and_keep


def _on_gpu(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of the graph of a script on the CPU that makes its tensors on a GPU.

    It is a plain module: one of Dynamo's own kind is not compiled again.
    """
    copied = copy.deepcopy(graph.graph)
    for node in copied.nodes:
        node.args, node.kwargs = map_aggregate((node.args, dict(node.kwargs)), _gpu_for_cpu)
        if node.op == "call_function" and getattr(node.target, "__name__", "") in FACTORIES:
            node.kwargs = {"device": "cuda"} | node.kwargs
    return torch.fx.GraphModule(graph, copied)


def _gpu_for_cpu(x: Any) -> Any:
    return "cuda" if x in ("cpu", torch.device("cpu")) else x


def _described(x: Any) -> Any:
    """A tensor like ``x`` on meta; of a symbol its example."""
    if not isinstance(x, Tensor):
        return _example(x)
    sizes, strides = ([_example(n) for n in numbers] for numbers in (x.size(), x.stride()))
    made = torch.empty_strided(sizes, strides, dtype=x.dtype, device="meta")
    return made.requires_grad_(x.requires_grad)


def _example(n: Any) -> Any:
    return int(n.node.hint) if isinstance(n, torch.SymInt) else n
