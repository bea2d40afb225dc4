"""All that this package knows of ``torch._inductor``, which is private to torch.

Serves torch 2.11 to 2.15 by what is there, not by version. What a release breaks breaks here.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import sympy  # type: ignore[import-untyped]  # it has no stubs
import torch
from torch._inductor import config, ir, lowering
from torch._inductor.lowering import fallback_handler, fallbacks, lowerings, register_lowering
from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
)
from torch._inductor.utils import sympy_index_symbol
from torch._inductor.virtualized import V

from .stages import stage_of

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


def captured_call(operator: torch._ops.OpOverload, *args: Any, **keywords: Any) -> Any:
    """The opaque call as a part of CUDA graphs, whatever the tags of the operator say."""
    start, result = len(V.graph.operations), eager_call(operator, *args, **keywords)
    for operation in V.graph.operations[start:]:
        # Inductor looks for the tag in the node that an operation was made for.
        vars(operation)["fx_node"] = None
    return result


def lowered(operator: torch._ops.OpOverload, *args: Any, **keywords: Any) -> Any:
    """What Inductor itself makes of an operator."""
    return lowerings[operator](*args, **keywords)


def is_packaged() -> bool:
    """Whether the code is for AOTInductor, and runs without Python."""
    return bool(V.graph.aot_mode)


def is_opaque(operator: Any) -> bool:
    """Whether an operator is none of torch's own, and Inductor has no rule for it."""
    if not isinstance(operator, torch._ops.OpOverload) or operator.namespace in ("aten", "prims"):
        return False
    # torch 2.11 has no rules of users. What was called once has a rule, which is the call.
    known = operator in lowerings or operator in getattr(lowering, "user_lowerings", ())
    return not known or operator in fallbacks


def node_of(operator: torch._ops.OpOverload) -> torch.fx.Node | None:
    """The call that is being lowered, if it is one of ``operator``."""
    node: torch.fx.Node | None = V.graph.current_node
    return node if node is not None and node.target is operator else None


def realize(x: IRNode) -> IRNode:
    """``x`` in memory, its strides fixed; copied only where it is no view of anything in memory."""
    node = ir.ExternKernel.realize_input(x)
    ir.as_storage_and_layout(node, freeze=True)
    return node


def contiguous(x: IRNode) -> IRNode:
    """``x`` contiguous in memory, copied where it lies there otherwise."""
    # A clone would be laid out as what it is a clone of, where that is not in memory yet.
    return realize(ir.ExternKernel.require_contiguous(x))


def realize_in_place(x: IRNode, name: str) -> IRNode:
    """``x``, to be written: its own memory and never a copy.

    Raises:
        Unsupported: it is a view that has no strides.
    """
    node = realize(x)
    if storage_name(node) != storage_name(x):
        raise Unsupported(f"{name} is not a strided view of a tensor in memory; pass it contiguous")
    return node


def storage_name(x: IRNode) -> str | None:
    """The buffer that a node lies in."""
    while not isinstance(x, ir.Buffer):
        inner = x.unwrap_view() if isinstance(x, ir.BaseView) else getattr(x, "data", None)
        if inner is None or inner is x:
            return None
        x = inner
    return x.get_name()


def device(x: IRNode) -> torch.device:
    found = x.get_device()
    assert found is not None
    return found


def is_aligned(x: IRNode) -> bool:
    """Whether the memory that ``x`` lies in starts at a multiple of 16 bytes."""
    return storage_name(x) not in getattr(V.graph, "unaligned_buffers", ())


def contiguous_layout(like: IRNode, size: Sequence[Any], dtype: torch.dtype) -> ir.Layout:
    strides = ir.FlexibleLayout.contiguous_strides(list(size))
    return ir.FixedLayout(device(like), dtype, list(size), strides)


def new_buffer(like: IRNode, size: Sequence[Any], dtype: torch.dtype) -> IRNode:
    """Memory that a template fills beside its main output."""
    return realize(lowering.empty_strided(list(size), None, dtype=dtype, device=like.get_device()))


def as_result(node: IRNode) -> Any:
    """A buffer of ``new_buffer`` as a lowering returns it."""
    return ir.TensorBox(node) if isinstance(node, ir.StorageBox) else ir.TensorBox.create(node)


def static_int(size: Any) -> int:
    """A size as a number, guarded where it is symbolic."""
    return int(V.graph.sizevars.guard_int(size))


def is_known(condition: Any) -> bool:
    """Whether a relation of sizes is known to hold, without a guard."""
    return bool(V.graph.sizevars.statically_known_true(condition))


def is_multiple(stride: Any, of: int, sizes: Sequence[Any]) -> bool:
    """Whether a stride is a multiple of ``of``: known, or of the example and then guarded.

    Guarded is a stride that is a number of its own, as those of a view are in a function that is
    compiled with dynamic shapes; not one that follows from ``sizes``, which would have a guard for
    each length.
    """
    relation = sympy.Eq(sympy.Mod(stride, of), 0)
    if is_known(relation):
        return True
    known = {symbol for size in sizes for symbol in sympy.sympify(size).free_symbols}
    sizevars = V.graph.sizevars
    if not isinstance(stride, sympy.Symbol) or stride in known or sizevars.shape_env.frozen:
        return False
    return bool(sizevars.guard_or_false(relation))


def computed(x: IRNode, index: Sequence[str]) -> tuple[Any, list[str], list[Any]] | None:
    """What computes an element of ``x``, where that is in no memory yet.

    It is a subgraph for a template, in which variables of the names ``index`` say which element;
    with it come names of the buffers that it reads, and the user's operations in it.
    """
    storage: Any = x
    while isinstance(storage, (ir.TensorBox, ir.BaseView)):
        storage = storage.data
    if not isinstance(storage, ir.StorageBox) or type(storage.data) is not ir.Pointwise:
        return None
    load, place = x.make_loader(), [sympy_index_symbol(name) for name in index]
    of: dict[str, Any] = {"device": device(x), "dtype": x.get_dtype()}
    data = ir.Pointwise(**of, inner_fn=lambda _: load(place), ranges=[])
    element = ir.ComputedBuffer(name=None, layout=ir.FlexibleLayout(**of, size=[]), data=data)
    sources = list(x.get_read_names())
    for name in sources:  # the subgraph has their strides
        V.graph.get_buffer(name).freeze_layout()
    return element, sources, list(storage.data.origins)


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
    inside: Sequence[Any] = (),
) -> Any:
    """The only choice, or the fastest; a mutation would be lost in a multi-template buffer."""
    keywords: dict[str, Any] = {"return_multi_template": False}
    if len(choices) > 1:
        keywords["input_gen_fns"] = generators
    chosen = autotune_select_algorithm(name, choices, inputs, layout, **keywords)
    # torch 2.11 returns the node, later releases a node and the choice.
    node = chosen[0] if isinstance(chosen, tuple) else chosen
    # A kernel is named after its origins; what computes its inputs elsewhere is none of them.
    buffer, operator = node.data.data, V.graph.current_node
    if operator in getattr(buffer, "origins", ()):
        buffer.origins = type(buffer.origins)([*inside, *stage_of(operator, name), operator])
    return node


def watch(node: Any, choices: list[Any], tell: Callable[[int, list[str]], None]) -> None:
    """Call ``tell`` when the code of a selected template is written, for a log.

    It is called with the place of the choice in ``choices``, and with the operations that were
    fused into it.
    """
    buffer = node.data.data
    make = buffer.make_kernel_render
    place = [choice.make_kernel_render for choice in choices].index(make)

    def make_and_tell(*args: Any, **keywords: Any) -> Any:
        group = V.graph.scheduler.current_node
        if group is not None:  # it is None where a fusion is only tried
            others = [n.node for n in group.get_nodes() if n.node not in (None, buffer)]
            fused = [str(x.target) for node in others if node for x in node.get_origins()]
            tell(place, list(dict.fromkeys(fused)))
        return make(*args, **keywords)

    buffer.make_kernel_render = make_and_tell


def hints(sizes: Sequence[Any]) -> list[int]:
    return [V.graph.sizevars.optimization_hint(size, fallback=64) for size in sizes]


# Generated code without a GPU: for lowering/generated.py and lowering/fake_gpu.py only. What these
# functions import is not needed by a lowering, which should not wait for it.


def initialise_passes() -> None:
    """Let Inductor trace its patterns as for a CPU, once, before anything is patched."""
    from torch._inductor import compile_fx  # noqa: F401 it imports what traces them
    from torch._inductor.fx_passes import joint_graph, post_grad

    joint_graph.lazy_init(torch.device("cpu"))
    post_grad.lazy_init()


def launcher_grid(inductor_meta: dict[str, Any], constants: dict[str, Any]) -> tuple[str, ...]:
    """Python for the grid of a launch: statements that come first, and its three sizes."""
    from torch._inductor.runtime import triton_heuristics

    grid = triton_heuristics.GridExpr.from_meta(inductor_meta, constants)
    return "\n".join(grid.prefix), str(grid.x_grid), str(grid.y_grid), str(grid.z_grid)


@contextlib.contextmanager
def recorded_kernels(record: Callable[..., Any]) -> Iterator[None]:
    """Let the decorators of a generated kernel return what ``record`` makes of it.

    It is called with the function, the kind of kernel, the configs that a GPU would choose from,
    ``triton_meta`` and ``inductor_meta``.
    """
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    def cached_autotune(
        size_hints: Any,
        configs: list[Any],
        triton_meta: dict[str, Any],
        heuristic_type: Any,
        filename: str | None = None,
        inductor_meta: dict[str, Any] | None = None,
        **_: Any,
    ) -> Callable[[Any], Any]:
        kind = heuristic_type.name.lower()
        return lambda fn: record(fn, kind, configs, triton_meta, inductor_meta or {})

    with (
        mock.patch.object(triton_heuristics, "cached_autotune", cached_autotune),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
    ):
        yield


@contextlib.contextmanager
def fake_device(on_cpu: Callable[[], Any]) -> Iterator[None]:
    """Inductor's share of ``fake_gpu``: it forgets what it knows of devices, before and after.

    Constants are folded in a context of ``on_cpu``.
    """
    from torch._dynamo import device_interface
    from torch._inductor.constant_folding import ConstantFolder
    from torch._inductor.fx_passes import joint_graph, post_grad

    fold = ConstantFolder.run

    def fold_on_cpu(folder: ConstantFolder) -> Any:
        with on_cpu():
            return fold(folder)

    registry = dict(device_interface.device_interfaces)
    initialised = device_interface._device_initialized
    _forget_device()
    try:
        # Tracing patterns on a GPU would leave them behind.
        with (
            mock.patch.object(joint_graph, "lazy_init"),
            mock.patch.object(post_grad, "lazy_init"),
            mock.patch.object(ConstantFolder, "run", fold_on_cpu),
        ):
            yield
    finally:
        _forget_device()
        device_interface.device_interfaces.clear()
        device_interface.device_interfaces.update(registry)
        device_interface._device_initialized = initialised


def _forget_device() -> None:
    from torch._inductor.runtime import hints

    hints.DeviceProperties.create.cache_clear()
    for name, module in list(sys.modules.items()):
        # cuda_env moves from release to release.
        if name in ("torch.utils._triton", "torch._inductor.utils") or name.endswith(".cuda_env"):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()


@contextlib.contextmanager
def capture(
    options: Mapping[str, Any],
    take: Callable[[str, str], Any],
    skip_cudagraph: Callable[[str], None],
) -> Iterator[None]:
    """Hand over what is generated, where Inductor would import it.

    Args:
        options: Settings of Inductor.
        take: Called with a module's source and ``inference``, ``forward`` or ``backward``; returns
            what stands for the imported module.
        skip_cudagraph: Called with each reason not to use CUDA graphs.
    """
    from torch._inductor import compile_fx, output_code, utils
    from torch._inductor.graph import GraphLowering

    def compile_to_module(graph: GraphLowering) -> Any:
        code: Any = graph.codegen()[0]
        phase = "backward" if graph.is_backward else "forward"
        return take(getattr(code, "value", code), "inference" if graph.is_inference else phase)

    def cudagraphify(model: Any, static_input_idxs: Sequence[int] = (), **known: Any) -> Any:
        moving = [i for i in known["mutated_input_idxs"] if i not in static_input_idxs]
        if moving:
            skip_cudagraph(f"skipping cudagraphs due to mutated inputs ({len(moving)} instances)")
        return model

    caches = ("fx_graph", "fx_graph_remote", "autotune_local", "autotune_remote")
    settings = {
        **{f"{cache}_cache": False for cache in (*caches, "bundled_autotune_remote")},
        "compile_threads": 1,
        "shape_padding": False,  # whether it pays is found out by measuring
        **options,
    }
    patches: tuple[tuple[Any, str, Any], ...] = (
        (GraphLowering, "compile_to_module", compile_to_module),
        (compile_fx, "cudagraphify", cudagraphify),
        (output_code, "log_cudagraph_skip_and_bump_counter", skip_cudagraph),
        (output_code, "maybe_handle_backward_generation", lambda *_: None),
        # Fake tensors have no address.
        (utils, "copy_misaligned_inputs", lambda *_: ([], [])),
    )
    with contextlib.ExitStack() as stack:
        # Whatever is written all the same is written where nobody reads it.
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}))
        stack.enter_context(config.patch(settings))
        for owner, name, value in patches:
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, value))
        yield
