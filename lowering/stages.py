"""Stages of an operator in the names of its kernels.

Inductor names a kernel after the nodes of the graph that it does the work of, and all templates of
an operator do that of one node. So each gets a second one, named after its stage: ``chunk`` becomes
``triton_tem_fused_chunk_prepare_0`` and ``triton_tem_fused_chunk_scan_1``.
"""

import functools

import torch
from torch.fx import Node

_LIBRARY = torch.library.Library("gdn_stage", "DEF")


def stage_of(node: Node, template: str) -> list[Node]:
    """A node for the stage that ``template`` is of ``node``, which is being lowered.

    It comes before ``node``, so that nothing lowers it, and has no arguments and no users. None
    where a template is the whole operator.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    operator = node.target._overloadpacket.__name__.rstrip("_")
    stage = template.removeprefix("gdn_").removeprefix(operator).strip("_")
    if not stage:
        return []
    with node.graph.inserting_before(node):
        named = node.graph.call_function(_operator(stage))
    named.meta = node.meta | {"original_aten": _operator(stage)}
    return [named]


@functools.cache
def _operator(stage: str) -> torch._ops.OpOverload:
    """A name that nobody calls."""
    _LIBRARY.define(f"{stage}() -> ()")
    found: torch._ops.OpOverload = getattr(torch.ops.gdn_stage, stage).default
    return found
