"""What Inductor may fuse into the output of an operator, seen in its graph before it is lowered.

An epilogue of a template is an elementwise kernel that reads all elements of its output and waits
for nothing else that comes of the template. So of the users of an output, through views:

- elementwise operations may be fused, once something needs their values in memory;
- what waits for a reduction or a product of the output is not, as the second half of a norm;
- reductions, products, opaque calls and results read the output itself as it lies.

Where a node is none that is known here, it may be fused.
"""

import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import _inductor

aten = torch.ops.aten

# They say where an element lies.
VIEWS = {
    *(operator.getitem, aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
    *(aten.slice.Tensor, aten.select.int, aten.alias.default, aten.detach.default),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int),
}
# They read their operands from memory, though Inductor knows what they compute; copy_ writes an
# input of the graph, which no epilogue does.
FROM_MEMORY = {
    *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default),
    aten.copy_.default,
}
# So many operations on the output alone are computed by what reads their result, not put in memory:
# Inductor does that from 5 tensors or 31 instructions on (``config.realize_reads_threshold`` and
# ``realize_opcount_threshold``). A norm has two.
INLINED = 4


def may_be_fused(node: Node) -> Node | None:
    """A node that Inductor may fuse into the main output of an operator; None where nothing can be.

    Args:
        node: The operator's call; of several results the first is the main output.
    """
    # Nodes that have elements of the output, each with the operations on them so far.
    elements: dict[Node, float] = {node: 0}
    # What can be computed only after the operator.
    later: set[Node] = set()
    waiting = set(node.users)
    x: Node
    for x in _nodes_after(node):
        if not waiting:
            break
        waiting.discard(x)
        inputs = x.all_input_nodes
        read = [i for i in inputs if i in elements]
        must_wait = any(i in later for i in inputs)
        kind = _kind(x) if read else None
        if x.target is operator.getitem and x.args[0] is node and x.args[1] != 0:
            later.add(x)
        elif read and not must_wait and kind in ("view", "elementwise"):
            elements[x] = sum(elements[i] for i in read)
            if kind == "elementwise" and not _differ_in_size(x, node):
                elements[x] += 1 if len(read) == len(inputs) else math.inf
            waiting |= set(x.users)
        elif read or must_wait:
            later.add(x)
            if read and kind is None and not must_wait:
                return x
            most = INLINED if kind in ("elementwise", "reduction") else 0
            in_memory = [i for i in read if elements[i] > most]
            if in_memory:
                return _computed(in_memory[0])
    return None


def _nodes_after(node: Node) -> Iterator[Node]:
    after = itertools.dropwhile(lambda x: x is not node, node.graph.nodes)
    return itertools.islice(after, 1, None)


def _computed(x: Node) -> Node:
    """What computes the elements that ``x`` is a view of."""
    while _kind(x) == "view":
        x = x.all_input_nodes[0]
    return x


def _kind(x: Node) -> str | None:
    """How a node reads the elements of a tensor."""
    is_ours = getattr(x.target, "namespace", None) == "gdn"
    if x.op == "output" or is_ours or x.target in FROM_MEMORY or _inductor.is_opaque(x.target):
        return "memory"
    if x.target in VIEWS:
        return "view"
    tags = getattr(x.target, "tags", ())
    if torch.Tag.pointwise in tags:
        return "elementwise"
    return "reduction" if torch.Tag.reduction in tags else None


def _differ_in_size(x: Node, node: Node) -> bool:
    """Whether ``x`` is known to have another number of elements than the output of ``node``."""
    sizes = [_numel(x), _numel(node)]
    return None not in sizes and statically_known_true(sizes[0] != sizes[1])


def _numel(x: Node) -> Any:
    value = x.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) else value
    return value.numel() if isinstance(value, torch.Tensor) else None
