"""All that this package knows of ``torch._inductor``, which is private to torch.

Serves torch 2.11 to 2.15 by looking at what is there, never at a version. What breaks with a new
release breaks here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import empty_strided, fallback_handler, lowerings, register_lowering
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
)
from torch._inductor.virtualized import V

IRNode = ir.IRNode
symbolic_grid = SymbolicGridFn


class Unsupported(Exception):
    """A call that a lowering leaves to the eager operator; its text is the reason."""


def add_lowering(operator: torch._ops.OpOverload, rule: Callable[..., Any]) -> None:
    """Let ``rule`` lower ``operator`` from now on."""
    register_lowering(operator, type_promotion_kind=None)(rule)


def remove_lowering(operator: torch._ops.OpOverload) -> None:
    lowerings.pop(operator, None)


def eager_call(operator: torch._ops.OpOverload, *args: Any, **keywords: Any) -> Any:
    """The opaque call that Inductor makes of an operator without a lowering."""
    return fallback_handler(operator, add_to_fallback_set=False)(*args, **keywords)


def realize(x: IRNode) -> IRNode:
    """``x`` in memory, its strides fixed; copied only where it is no view of anything in memory."""
    node = ir.ExternKernel.realize_input(x)
    ir.as_storage_and_layout(node, freeze=True)
    return node


def realize_in_place(x: IRNode, name: str) -> IRNode:
    """``x``, to be written: its own memory and never a copy.

    Raises:
        Unsupported: it is a view that has no strides.
    """
    node = realize(x)
    if not _is_storage_of(node, x):
        raise Unsupported(f"{name} is not a strided view of a tensor in memory; pass it contiguous")
    return node


def _is_storage_of(node: IRNode, x: IRNode) -> bool:
    return storage_name(node) == storage_name(x)


def storage_name(x: IRNode) -> str | None:
    """The buffer that a node lies in."""
    while not isinstance(x, ir.Buffer):
        inner = x.unwrap_view() if isinstance(x, ir.BaseView) else getattr(x, "data", None)
        if inner is None or inner is x:
            return None
        x = inner
    return x.get_name()


def contiguous_layout(like: IRNode, size: Sequence[Any], dtype: torch.dtype) -> ir.Layout:
    strides = ir.FlexibleLayout.contiguous_strides(list(size))
    return ir.FixedLayout(like.get_device(), dtype, list(size), strides)


def new_buffer(like: IRNode, size: Sequence[Any], dtype: torch.dtype) -> IRNode:
    """Memory that a template fills beside its main output."""
    return realize(empty_strided(list(size), None, dtype=dtype, device=like.get_device()))


def as_result(node: IRNode) -> Any:
    """A buffer of ``new_buffer`` as a lowering returns it."""
    return ir.TensorBox.create(node) if not isinstance(node, ir.TensorBox) else node


def static_int(size: Any) -> int:
    """A size as a number, guarded where it is symbolic."""
    return int(V.graph.sizevars.guard_int(size))


def is_known(condition: Any) -> bool:
    """Whether a relation of sizes is known to hold, without a guard."""
    return bool(V.graph.sizevars.statically_known_true(condition))


def may_autotune() -> bool:
    """Whether the user asked for more than one choice to be timed."""
    return bool(config.max_autotune or config.max_autotune_gemm)


def add_template(name: str, grid: Any, source: str) -> TritonTemplate:
    """A template, made once; torch 2.13 and older refuse a second one of the same name."""
    known = TritonTemplate.all_templates.get(name)
    return known if known is not None else TritonTemplate(name, grid, source)


def select(
    name: str,
    choices: list[Any],
    inputs: list[IRNode],
    layout: ir.Layout,
    generators: dict[int, Callable[[Any], torch.Tensor]],
) -> Any:
    """The only choice, or the fastest; a mutation would be lost in a multi-template buffer."""
    keywords: dict[str, Any] = {"return_multi_template": False}
    if len(choices) > 1:
        keywords["input_gen_fns"] = generators
    chosen = autotune_select_algorithm(name, choices, inputs, layout, **keywords)
    # torch 2.11 returns the node, later releases a node and the choice.
    return chosen[0] if isinstance(chosen, tuple) else chosen


def _hints(sizes: Sequence[Any]) -> list[int]:
    return [V.graph.sizevars.optimization_hint(size, fallback=64) for size in sizes]


def same_number(value: int) -> Callable[[IRNode], torch.Tensor]:
    """For timing: indices that are all ``value``."""
    return lambda x: torch.full(
        _hints(x.get_size()), value, dtype=x.get_dtype(), device=x.get_device()
    )


def even_bounds(tokens: Any) -> Callable[[IRNode], torch.Tensor]:
    """For timing: packed sequences of one length."""

    def make(x: IRNode) -> torch.Tensor:
        (count,), (end,) = _hints(x.get_size()), _hints([tokens])
        return torch.linspace(0, end, count, device=x.get_device()).to(x.get_dtype())

    return make


def few_slots(count: Any) -> Callable[[IRNode], torch.Tensor]:
    """For timing: a pool of ``count`` slots with the strides of the caller's, never his own."""

    def make(x: IRNode) -> torch.Tensor:
        size = _hints([count, *x.get_size()[1:]])
        strides = _hints(x.get_stride())
        options = {"dtype": x.get_dtype(), "device": x.get_device()}
        return torch.empty_strided(size, strides, **options).normal_()

    return make
