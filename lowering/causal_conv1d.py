"""``causal_conv1d`` and ``causal_conv1d_`` as one template, of gdn_ops/kernels/causal_conv1d.py."""

from typing import Any

import torch

from gdn_ops.kernels import causal_conv1d as kernels
from gdn_ops.kernels.causal_conv1d_tiles import causal_conv1d_config
from gdn_ops.kernels.configs import next_power_of_2

from . import _inductor, timing
from ._inductor import IRNode, Unsupported
from .template import Config, KernelTemplate, require_cuda


@_inductor.symbolic_grid
def grid(sequences: Any, T: Any, D: Any, meta: dict[str, Any], *, cdiv: Any) -> Any:
    if meta["IS_VARLEN"]:
        # T // BT + 1 and one for each sequence.
        blocks = cdiv(T + 1, meta["BT"]) + sequences
    else:
        blocks = cdiv(T, meta["BT"]) * sequences
    return (blocks * cdiv(D, meta["BD"]), 1, 1)


TEMPLATE = KernelTemplate(
    "gdn_causal_conv1d",
    kernels.causal_conv1d_kernel,
    grid,
    axes=kernels.AXES,
    sizes=kernels.SIZES,
    tile=("BR", "BD"),
    output="y",
)


def supports(x: IRNode) -> None:
    """Raise for a call that the kernel cannot serve.

    Raises:
        Unsupported: with the reason.
    """
    require_cuda(x)
    if x.get_dtype() == torch.float64:
        raise Unsupported("the kernels compute in float32; pass x in a smaller dtype")


def is_dense(weight: IRNode) -> bool:
    """Whether the taps of a channel, and channels, follow each other in memory."""
    channel, tap = weight.get_stride()
    return _inductor.is_known(tap == 1) and _inductor.is_known(channel == weight.get_size()[1])


def _configs(
    x: IRNode, weight: IRNode, written: IRNode, sequences: Any, is_varlen: bool
) -> list[Config]:
    T = x.get_size()[1]
    D, W = (_inductor.static_int(size) for size in weight.get_size())
    tokens, channels = x.get_stride()[1:]
    hints = _inductor.hints([sequences, T])
    BT, BR, BD, warps = causal_conv1d_config(
        hints[0],
        hints[1],
        D,
        W,
        itemsize=x.get_dtype().itemsize,
        is_varlen=is_varlen,
        is_channel_major=_inductor.is_known(tokens == 1) and not _inductor.is_known(channels == 1),
        has_wide_state=not _inductor.is_known(written.get_stride()[1] == 1),
    )
    if not _inductor.is_known(T <= BT):
        # Only the first block of a sequence may reach into its history.
        BT = max(BT, next_power_of_2(W - 1))
    configs = [Config.of(warps, 1, BT=BT, BR=BR, BD=BD)]
    if _inductor.may_autotune():
        configs += [Config.of(2 * warps, 1, BT=BT, BR=BR, BD=2 * BD)]
        configs += [Config.of(warps, 1, BT=BT, BR=BR, BD=BD // 2)] if BD > 1 else []
    return configs


def _call(
    tensors: dict[str, IRNode | None], activation: str | None, null_index: int, in_place: bool
) -> Any:
    """Add the kernel to the graph; returns ``y``."""
    x, weight, cu_seqlens = tensors["x"], tensors["weight"], tensors["cu_seqlens"]
    written = tensors["state" if in_place else "final_state"]
    assert x is not None
    assert weight is not None
    assert written is not None
    B, T, _ = x.get_size()
    D, W = (_inductor.static_int(size) for size in weight.get_size())
    columns = _inductor.static_int(written.get_size()[2])
    sequences = B if cu_seqlens is None else cu_seqlens.get_size()[0] - 1
    is_verify = tensors["num_accepted_tokens"] is not None
    return TEMPLATE.call(
        tensors,
        _inductor.contiguous_layout(x, [B, T, D], x.get_dtype()),
        _configs(x, weight, written, sequences, cu_seqlens is not None),
        mutated=["state" if in_place else "final_state"],
        aliases={"final_state": "state"} if in_place else None,
        call_sizes=[sequences, T, D],
        generators=timing.of_rows(x, cu_seqlens, tensors["state_indices"]),
        null_index=null_index,
        D=D,
        W=W,
        S=columns - W + 2,
        HAS_BIAS=tensors["bias"] is not None,
        HAS_STATE=tensors["state"] is not None,
        IS_POOL=in_place,
        HAS_INDICES=tensors["state_indices"] is not None,
        HAS_ACCEPTED=is_verify,
        IS_VARLEN=cu_seqlens is not None,
        IS_SILU=activation == "silu",
        IS_WEIGHT_DENSE=is_dense(weight),
        BC=next_power_of_2(columns if is_verify else W - 1),
    )


def lower(
    x: IRNode,
    weight: IRNode,
    bias: IRNode | None = None,
    initial_state: IRNode | None = None,
    cu_seqlens: IRNode | None = None,
    *,
    activation: str | None = None,
) -> Any:
    """``gdn::causal_conv1d``."""
    supports(x)
    N = x.get_size()[0] if cu_seqlens is None else cu_seqlens.get_size()[0] - 1
    D, W = (_inductor.static_int(size) for size in weight.get_size())
    dtype = x.get_dtype() if initial_state is None else initial_state.get_dtype()
    inputs = {"x": x, "weight": weight, "bias": bias, "state": initial_state}
    inputs["cu_seqlens"] = cu_seqlens
    tensors = {name: node and _inductor.realize(node) for name, node in inputs.items()}
    tensors |= dict.fromkeys(("state_indices", "num_accepted_tokens"))
    final_state = _inductor.new_buffer(x, [N, D, W - 1], dtype)
    tensors["final_state"] = final_state
    y = _call(tensors, activation, -1, in_place=False)
    return y, _inductor.as_result(final_state)


def lower_(
    x: IRNode,
    weight: IRNode,
    bias: IRNode | None,
    state: IRNode,
    state_indices: IRNode | None = None,
    num_accepted_tokens: IRNode | None = None,
    cu_seqlens: IRNode | None = None,
    *,
    activation: str | None = None,
    null_index: int = -1,
) -> Any:
    """``gdn::causal_conv1d_``."""
    supports(x)
    inputs = {"x": x, "weight": weight, "bias": bias, "state_indices": state_indices}
    inputs |= {"num_accepted_tokens": num_accepted_tokens, "cu_seqlens": cu_seqlens}
    tensors = {name: node and _inductor.realize(node) for name, node in inputs.items()}
    tensors["state"] = _inductor.realize_in_place(state, "state")
    return _call(tensors, activation, null_index, in_place=True)
