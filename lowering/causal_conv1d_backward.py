"""``causal_conv1d_backward`` as a template, and the sum over what its programs leave."""

from typing import Any

import torch
from torch.utils._sympy.functions import FloorDiv

from gdn_ops.kernels import causal_conv1d_backward as kernels
from gdn_ops.kernels.causal_conv1d_tiles import causal_conv1d_backward_config

from . import _inductor
from ._inductor import IRNode
from .causal_conv1d import grid, is_dense, supports
from .template import Config, KernelTemplate

aten, prims = torch.ops.aten, torch.ops.prims

TEMPLATE = KernelTemplate(
    "gdn_causal_conv1d_backward",
    kernels.causal_conv1d_backward_kernel,
    grid,
    axes=kernels.AXES,
    sizes=kernels.SIZES,
    tile=("1", "BD"),
    output="dx",
)


def _channels_innermost(x: IRNode) -> IRNode:
    """The kernel reads whole rows of channels: with other strides a copy is cheaper."""
    node = _inductor.realize(x)
    if _inductor.is_known(node.get_stride()[2] == 1):
        return node
    copy = _inductor.lowered(aten.clone.default, x, memory_format=torch.contiguous_format)
    return _inductor.realize(copy)


def lower(
    dy: IRNode,
    dfinal_state: IRNode,
    x: IRNode,
    weight: IRNode,
    bias: IRNode | None = None,
    initial_state: IRNode | None = None,
    cu_seqlens: IRNode | None = None,
    *,
    activation: str | None = None,
) -> Any:
    """``gdn::causal_conv1d_backward``."""
    supports(x)
    B, T, _ = x.get_size()
    D, W = (_inductor.static_int(size) for size in weight.get_size())
    N = B if cu_seqlens is None else cu_seqlens.get_size()[0] - 1
    sequences, tokens = _inductor.hints([N, T])
    is_varlen = cu_seqlens is not None
    BT, BR, BD, warps = causal_conv1d_backward_config(
        sequences, tokens, D, W, itemsize=x.get_dtype().itemsize, is_varlen=is_varlen
    )
    # Not `//`: of a symbol that is a floor of floating-point numbers, and may be one too small.
    blocks = N + FloorDiv(T, BT) + 1 if is_varlen else N * FloorDiv(T + BT - 1, BT)
    dtaps = _inductor.new_buffer(x, [blocks, W + 1, D], torch.float32)
    weight = _inductor.realize(weight)
    inputs = {"dfinal_state": dfinal_state, "bias": bias, "state": initial_state}
    inputs["cu_seqlens"] = cu_seqlens
    tensors = {name: node and _inductor.realize(node) for name, node in inputs.items()}
    tensors["weight"] = weight
    tensors |= {"dy": _channels_innermost(dy), "x": _channels_innermost(x), "dtaps": dtaps}
    dstate = _inductor.new_buffer(x, [0], x.get_dtype())
    if initial_state is not None:
        dstate = _inductor.new_buffer(x, [N, D, W - 1], initial_state.get_dtype())
    tensors["dstate"] = dstate if initial_state is not None else None
    dx = TEMPLATE.call(
        tensors,
        _inductor.contiguous_layout(x, [B, T, D], x.get_dtype()),
        [Config.of(warps, 1, BT=BT, BR=BR, BD=BD)],
        mutated=["dtaps"] if initial_state is None else ["dtaps", "dstate"],
        call_sizes=[N, T, D],
        D=D,
        W=W,
        HAS_BIAS=bias is not None,
        HAS_STATE=initial_state is not None,
        IS_VARLEN=is_varlen,
        IS_SILU=activation == "silu",
        IS_WEIGHT_DENSE=is_dense(weight),
    )
    dweight, dbias = _sums(_inductor.as_result(dtaps), W, weight, bias)
    if dbias is None:
        dbias = _inductor.as_result(_inductor.new_buffer(x, [0], x.get_dtype()))
    return dx, dweight, dbias, _inductor.as_result(dstate)


def _sums(dtaps: IRNode, W: int, weight: IRNode, bias: IRNode | None) -> tuple[Any, Any]:
    """``dweight [D, W]`` and ``dbias [D]``, if there is one, from ``dtaps [P, W + 1, D]``."""
    taps = _inductor.lowered(aten.slice.Tensor, dtaps, 1, 0, W)
    dweight = _inductor.lowered(
        aten.sum.dim_IntList, _inductor.lowered(aten.permute.default, taps, [0, 2, 1]), [0]
    )
    dweight = _inductor.lowered(prims.convert_element_type.default, dweight, weight.get_dtype())
    if bias is None:
        return dweight, None
    dbias = _inductor.lowered(
        aten.sum.dim_IntList, _inductor.lowered(aten.select.int, dtaps, 1, W), [0]
    )
    return dweight, _inductor.lowered(prims.convert_element_type.default, dbias, bias.get_dtype())
