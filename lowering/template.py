"""An ordinary Triton kernel becomes an Inductor template.

The template's text is the kernel's own source (docs/kernels.md says how a kernel is written):

- its tensors become ``def_kernel``; an absent one becomes ``None``;
- its strides and sizes become the ``stride`` and ``size`` hooks;
- a call of ``load_input`` becomes what computes the input, where that is not in memory yet;
- its one call of ``store_output`` becomes the hook through which Inductor fuses what follows;
- the ``@triton.jit`` functions that it calls are appended, so that the generated code is complete.
"""

import ast
import functools
import inspect
import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import _inductor, timing
from ._inductor import IRNode
from .prologue import Computed, element_index

log = logging.getLogger(__name__)


def require_cuda(x: IRNode) -> None:
    """Raise for a tensor where there are no kernels.

    Raises:
        Unsupported: with the reason.
    """
    device = _inductor.device(x)
    if device.type != "cuda":
        raise _inductor.Unsupported(
            f"there are no kernels for {device.type}; move the inputs to a CUDA device, or keep "
            "the eager operator"
        )


@dataclass(frozen=True)
class Config:
    """Tiles, warps and stages of one choice."""

    tiles: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    @staticmethod
    def of(num_warps: int, num_stages: int, **tiles: int) -> "Config":
        return Config(tuple(tiles.items()), num_warps, num_stages)

    def __str__(self) -> str:
        tiles = ", ".join(f"{name}={size}" for name, size in self.tiles)
        return f"{tiles}, num_warps={self.num_warps}, num_stages={self.num_stages}"


@dataclass(frozen=True, eq=False)
class KernelTemplate:
    """The templates of one kernel, one for each set of tensors that a call has.

    Args:
        name: Operator and stage, such as ``gdn_chunk_scan``.
        kernel: The ``@triton.jit`` function.
        grid: The launch grid, made by ``_inductor.symbolic_grid``.
        axes: Letters of the dimensions of each tensor, ``{"q": "bthk"}``.
        sizes: Size arguments, ``{"T": "q_t"}``.
        tile: Names of the tile's sizes at ``store_output``, such as ``("BT", "BV")``.
        output: Name of the main output among the kernel's arguments.
        in_place: Tensors that it reads and writes; those of ``aliases`` are others.
    """

    name: str
    kernel: Any
    grid: Any
    axes: Mapping[str, str]
    sizes: Mapping[str, str]
    tile: tuple[str, ...]
    output: str = "o"
    in_place: tuple[str, ...] = ()
    _made: dict[Any, Any] = field(default_factory=dict)

    def call(
        self,
        tensors: Mapping[str, IRNode | None],
        layout: Any,
        configs: Sequence[Config],
        *,
        mutated: Sequence[str] = (),
        aliases: Mapping[str, str] | None = None,
        computed: Mapping[str, Computed] | None = None,
        call_sizes: Sequence[Any],
        generators: Mapping[str, Callable[[Any], Any]] | None = None,
        **constants: Any,
    ) -> Any:
        """Add a launch of the kernel to the graph; returns its main output.

        Args:
            tensors: All tensors of the signature, None where absent; the main output only where the
                kernel stores it itself, and not by ``store_output``.
            layout: Of the main output; of an output in its place that is never written, else.
            configs: Choices; more than one is timed, or the first taken where none can be.
            mutated: Names of tensors that the kernel writes.
            aliases: Tensors that are another one under a second name, ``{"final_state": "state"}``.
            computed: What the kernel computes where it would load it; not in ``tensors``.
            call_sizes: What the grid is computed from.
            generators: For timing, makes an input of a name from its node.
            constants: ``tl.constexpr`` arguments but the tiles.

        Raises:
            Unsupported: no configuration can serve the call.
        """
        present = {name: x for name, x in tensors.items() if x is not None}
        ranks = tuple((name, len(x.get_size())) for name, x in present.items())
        computed = computed or {}
        template = self._template(ranks, tuple((aliases or {}).items()), tuple(computed))
        nodes = list(present.values())
        makers = {name: make for name, make in (generators or {}).items() if name in present}
        if not all(timing.can_be_made(present[name]) for name in makers):
            configs = configs[:1]
        choices: list[Any] = []
        errors = [
            template.maybe_append_choice(
                choices,
                input_nodes=nodes,
                layout=layout,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                mutated_inputs=[present[name] for name in mutated] or None,
                subgraphs=[item.element for item in computed.values()] or None,
                call_sizes=list(call_sizes),
                **constants,
                **dict(config.tiles),
            )
            for config in configs
        ]
        if not choices:
            raise _inductor.Unsupported(f"no configuration serves it ({errors[0]})")
        inputs = {list(present).index(name): make for name, make in makers.items()}
        # A choice has found what its subgraphs read.
        names = {_inductor.storage_name(x) for x in nodes}
        read = [x for x in choices[0].input_nodes if _inductor.storage_name(x) not in names]
        origins = [x for item in computed.values() for x in item.origins]
        node = _inductor.select(self.name, choices, nodes + read, layout, inputs, origins)
        if log.isEnabledFor(logging.DEBUG):
            served = [str(c) for c, error in zip(configs, errors, strict=True) if error is None]
            if len(served) > 1:
                log.debug("%s: timed: %s", self.name, "; ".join(served))
            inside = list(dict.fromkeys(str(x.target) for x in origins))
            _inductor.watch(
                node, choices, lambda place, fused: self._tell(served[place], inside + fused)
            )
        return node

    def _tell(self, config: str, fused: Sequence[str]) -> None:
        log.debug("%s: %s, fused: %s", self.name, config, ", ".join(fused) or "nothing")

    def _template(
        self,
        ranks: tuple[tuple[str, int], ...],
        aliases: tuple[tuple[str, str], ...],
        computed: tuple[str, ...],
    ) -> Any:
        key = (ranks, aliases, computed)
        if key not in self._made:
            source = template_source(self, dict(ranks), dict(aliases), computed)
            name = f"{self.name}_{len(self._made)}"
            self._made[key] = _inductor.add_template(name, self.grid, source)
        return self._made[key]


def template_source(
    template: KernelTemplate,
    ranks: Mapping[str, int],
    aliases: Mapping[str, str],
    computed: Sequence[str] = (),
) -> str:
    """The text of a template whose call has tensors of these names and ranks.

    ``computed`` are the names of those that the n-th subgraph computes.
    """
    source, tree = _parsed(template.kernel)
    arguments = [argument.arg for argument in tree.args.args]
    lines = [f"{{{{def_kernel({', '.join(map(repr, ranks))})}}}}"]
    lines += [f"    # {line}".rstrip() for line in _legend(template, aliases)]
    for name in arguments:
        head = _argument(template, name, ranks, aliases)
        lines += [f"    {head}"] if head else []
    lines += _body(template, source, tree, computed)
    for helper in _helpers(template.kernel):
        lines += ["", "", "@triton.jit", *_parsed(helper)[0].splitlines()]
    return "\n".join(lines) + "\n"


def _legend(template: KernelTemplate, aliases: Mapping[str, str]) -> list[str]:
    module = inspect.getmodule(template.kernel.fn)
    title = (inspect.getdoc(module) or "").partition("\n\n")[0]
    legend = [f"{template.name}: {title}", f"source: {getattr(module, '__name__', '')}"]
    in_place = (*template.in_place, *aliases.values())
    return [*legend, f"in place: {', '.join(in_place)}"] if in_place else legend


def _argument(
    template: KernelTemplate, name: str, ranks: Mapping[str, int], aliases: Mapping[str, str]
) -> str | None:
    """The line that defines an argument of the kernel inside the template, if one must."""
    if name in aliases:
        return f"{name} = {aliases[name]}"
    if name in template.axes:
        return None if name in ranks or name == template.output else f"{name} = None"
    if name.startswith("stride_"):
        tensor, _, axis = name.removeprefix("stride_").rpartition("_")
        source = aliases.get(tensor, tensor)
        index = template.axes[tensor].index(axis)
        # An absent tensor has no strides, one of a lower rank lacks the last ones: a kernel names
        # them in no branch that is taken.
        if index >= ranks.get(source, 0):
            return None
        return f"{name} = {{{{stride({source!r}, {index})}}}}"
    if name in template.sizes:
        tensor, _, axis = template.sizes[name].rpartition("_")
        if tensor not in ranks and tensor != template.output:
            return f"{name} = None"
        return f"{name} = {{{{size({tensor!r}, {template.axes[tensor].index(axis)})}}}}"
    return None  # a constexpr


def _body(
    template: KernelTemplate, source: str, tree: ast.FunctionDef, computed: Sequence[str]
) -> list[str]:
    """The lines of the kernel's body, with hooks in the places of the store and of loads."""
    stores = [x.value for x in _statements(tree, ast.Expr) if _calls(x.value, "store_output")]
    assert len(stores) == 1, f"{template.name} must call store_output once"
    hooks = [(stores[0], _store_hook(template, stores[0]))]
    for x in _statements(tree, ast.Assign):
        if _calls(x.value, "load_input") and x.value.args[0].id in computed:
            hooks.append((x, _load_hook(x, computed.index(x.value.args[0].id))))
    lines = source.splitlines()
    # The last ones first, which leaves the others' lines where they are.
    for node, hook in sorted(hooks, key=lambda item: -item[0].lineno):
        lines[node.lineno - 1 : node.end_lineno] = hook
    return lines[tree.body[0].lineno - 1 :]


def _statements(tree: ast.AST, kind: type) -> list[Any]:
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def _calls(value: ast.AST, name: str) -> bool:
    return isinstance(value, ast.Call) and getattr(value.func, "id", None) == name


def _store_hook(template: KernelTemplate, call: ast.Call) -> list[str]:
    _, index, _, value, mask = call.args
    assert isinstance(index, ast.Tuple)
    pad = " " * call.col_offset
    names = [f"o_out_{i}" for i in range(len(index.elts))]
    tile = f"[{', '.join(template.tile)}]"
    hook = [
        f"{pad}{name} = {ast.unparse(element)} + tl.zeros({tile}, tl.int32)"
        for name, element in zip(names, index.elts, strict=True)
    ]
    hook += [f"{pad}b_out = {ast.unparse(value)}", f"{pad}m_out = {ast.unparse(mask)}"]
    shape = "".join(f"{size!r}, " for size in template.tile)
    hook += [
        f'{pad}{{{{store_output(({", ".join(map(repr, names))},), "b_out", "m_out", '
        f"indent_width={len(pad)}, val_shape=({shape}))}}}}"
    ]
    return hook


def _load_hook(statement: ast.Assign, number: int) -> list[str]:
    """What a subgraph reads must be there: where an index is masked, it computes the first."""
    assert isinstance(statement.value, ast.Call)
    p_x, index, _, m_x = statement.value.args
    assert isinstance(index, ast.Tuple)
    places, mask = [ast.unparse(x) for x in index.elts], ast.unparse(m_x)
    is_masked = mask != "True"
    if is_masked:
        places = [f"tl.where({mask}, {place}, 0)" for place in places]
    pad, name = " " * statement.col_offset, ast.unparse(statement.targets[0])
    hook = [f"# {ast.unparse(p_x)}, computed where it would be loaded"]
    hook += [f"{i} = {place}" for i, place in zip(element_index(len(places)), places, strict=True)]
    hook += [f"{{{{modification({number}, {name!r}) | trim | indent({len(pad)})}}}}"]
    hook += [f"{name} = tl.where({mask}, {name}, 0.0)"] if is_masked else []
    return [pad + line for line in hook]


@functools.cache
def _parsed(kernel: Any) -> tuple[str, ast.FunctionDef]:
    """Source of a function from its ``def`` on, and its syntax tree."""
    source = textwrap.dedent(inspect.getsource(kernel.fn))
    source = source[source.index("def ") :]
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return source.rstrip(), tree


def _helpers(kernel: Any) -> list[Any]:
    """The ``@triton.jit`` functions that a kernel calls, and those that they call."""
    found: dict[str, Any] = {}

    def visit(function: Any) -> None:
        for node in ast.walk(_parsed(function)[1]):
            if isinstance(node, ast.Name) and node.id not in found and node.id != "store_output":
                value = function.fn.__globals__.get(node.id)
                if hasattr(value, "fn") and hasattr(value.fn, "__globals__"):
                    found[node.id] = value
                    visit(value)

    visit(kernel)
    return list(found.values())
