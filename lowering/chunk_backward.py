"""``chunk_backward`` and ``recurrent_backward`` as four templates, one for each stage.

Where the operator itself has kernels in Gluon, which are no templates, it stays a call of it.
"""

import logging
from typing import Any

import sympy  # type: ignore[import-untyped]  # it has no stubs
import torch
from torch.utils._sympy.functions import FloorDiv

from gdn_ops.kernels import (
    chunk_backward_gradients,
    chunk_backward_replay,
    chunk_backward_reverse,
    chunk_prepared,
)
from gdn_ops.kernels.chunk_backward import BackwardTiles, pick_backward, rows_of_heads
from gdn_ops.kernels.chunk_backward_hopper import serves_backward
from gdn_ops.kernels.chunk_backward_places import PLACE_BN
from gdn_ops.kernels.configs import Gpu, gpu_at

from . import _inductor
from ._inductor import IRNode
from .chunk import PREPARE, prepare_config, supports
from .chunk_choice import fits_descriptor
from .template import Config, KernelTemplate

log = logging.getLogger(__name__)

aten, prims = torch.ops.aten, torch.ops.prims

_DOT = {
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}


@_inductor.symbolic_grid
def grid(sequences: Any, value_heads: Any, V: Any, meta: dict[str, Any], *, cdiv: Any) -> Any:
    return (sequences * value_heads * cdiv(V, meta["BV"]), 1, 1)


@_inductor.symbolic_grid
def gradients_grid(places: Any, heads: Any, meta: dict[str, Any]) -> Any:
    return (places * heads, 1, 1)


def _template(stage: str, module: Any, kernel: Any, grid: Any, *tile: str, output: str) -> Any:
    name = f"gdn_chunk_backward_{stage}"
    return KernelTemplate(name, kernel, grid, module.AXES, module.SIZES, tile, output)


REPLAY = _template(
    "replay",
    chunk_backward_replay,
    chunk_backward_replay.chunk_replay_kernel,
    grid,
    *("BT", "BV"),
    output="u",
)
REVERSE = _template(
    "reverse",
    chunk_backward_reverse,
    chunk_backward_reverse.chunk_reverse_kernel,
    grid,
    *("BT", "BV"),
    output="dr",
)
GRADIENTS = _template(
    "gradients",
    chunk_backward_gradients,
    chunk_backward_gradients.chunk_gradients_kernel,
    gradients_grid,
    *("BT", "BK"),
    output="dq",
)


def _head_major(beta: IRNode) -> IRNode:
    """``beta`` in float32, the tokens of a head adjacent in rows of 16-byte multiples."""
    T = beta.get_size()[1]
    padding = [0, FloorDiv(T + 3, 4) * 4 - T]
    rows = _inductor.lowered(prims.convert_element_type.default, beta, torch.float32)
    rows = _inductor.lowered(aten.permute.default, rows, [0, 2, 1])
    rows = _inductor.lowered(aten.constant_pad_nd.default, rows, padding, 0.0)
    rows = _inductor.as_result(_inductor.contiguous(rows))
    rows = _inductor.lowered(aten.slice.Tensor, rows, 2, 0, T)
    return _inductor.realize(_inductor.lowered(aten.permute.default, rows, [0, 2, 1]))


def _use_descriptors(gpu: Gpu, *tensors: IRNode) -> bool:
    """Whether tokens may be read by tensor descriptors."""
    steps = [step for x in tensors for step in x.get_stride()]
    return (
        gpu.has_descriptors
        and tensors[0].get_dtype() != torch.float32
        and not any(_inductor.is_known(sympy.Eq(step, 0)) for step in steps)
        and all(fits_descriptor(x) for x in tensors)
    )


def _is_call(do: IRNode, q: IRNode, k: IRNode, v: IRNode) -> bool:
    """Whether the operator would run on kernels in Gluon, which take half of the time."""
    if _inductor.is_packaged():
        return False  # its code runs without Python
    gpu = gpu_at(_inductor.device(q).index or 0)
    K, V = (_inductor.static_int(x.get_size()[3]) for x in (q, v))
    use_descriptors = _use_descriptors(gpu, q, k, v, do)
    return serves_backward(do.get_dtype(), q.get_dtype(), K, V, use_descriptors, gpu)


class _Call:
    """The sizes, flags and buffers that the stages of one call share."""

    def __init__(
        self,
        inputs: dict[str, IRNode | None],
        scale: float | None,
        use_qk_l2norm: bool,
    ) -> None:
        self.inputs = inputs
        q, v, cu_seqlens = inputs["q"], inputs["v"], inputs["cu_seqlens"]
        assert q is not None
        assert v is not None
        self.q, self.v = q, v
        self.B, self.T = q.get_size()[:2]
        sizes = (*q.get_size()[2:], *v.get_size()[2:])
        self.H, self.K, self.HV, self.V = (_inductor.static_int(size) for size in sizes)
        self.N = self.B if cu_seqlens is None else cu_seqlens.get_size()[0] - 1
        self.gpu = gpu_at(_inductor.device(q).index or 0)
        self.tiles: BackwardTiles = pick_backward(
            self.K, self.V, q.get_dtype(), self.gpu, cu_seqlens is not None
        )
        chunks = FloorDiv(self.T + self.tiles.BT - 1, self.tiles.BT)
        self.places = chunks * self.B if cu_seqlens is None else chunks + self.N
        self.scale = self.K**-0.5 if scale is None else scale
        self.use_qk_l2norm = use_qk_l2norm
        self.use_descriptors = False
        self.flags: dict[str, Any] = {
            "H": self.H,
            "HV": self.HV,
            "K": self.K,
            "HAS_BETA": inputs["beta"] is not None,
            "IS_VARLEN": cu_seqlens is not None,
            "USE_QK_L2NORM": use_qk_l2norm,
            "DOT": _DOT[q.get_dtype()],
            "PRECISION": repr(chunk_prepared.PRECISION),
        }

    def new(self, *size: Any, dtype: torch.dtype | None = None) -> IRNode:
        return _inductor.new_buffer(self.q, list(size), dtype or self.q.get_dtype())

    def named(self, *names: str, **others: IRNode | None) -> dict[str, IRNode | None]:
        return {name: self.inputs[name] for name in names} | others

    def token_layout(self, like: IRNode, *size: Any) -> Any:
        return _inductor.contiguous_layout(like, [self.B, self.T, *size], like.get_dtype())

    def prepare(self) -> dict[str, IRNode | None]:
        """``G`` and ``inverse``."""
        BT = self.tiles.BT
        dtype = self.q.get_dtype()
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        rows = chunk_prepared.rows_of_decays(self.use_qk_l2norm, is_scaled=False)
        G = self.new(self.places, self.HV, rows, BT, dtype=wide)
        inverse = PREPARE.call(
            self.named("q", "k", "g", "beta", "cu_seqlens", G=G),
            self.token_layout(self.q, self.HV, BT),
            [prepare_config(dtype, self.gpu, BT, self.tiles.BK, self.H, self.HV, self.places)],
            mutated=["G"],
            call_sizes=[self.places, self.HV],
            HAS_G=self.inputs["g"] is not None,
            IS_SCALED=False,
            **chunk_prepared.ALONE,
            **self.flags,
        )
        return {"G": G, "inverse": _inductor.realize(inverse)}

    def scan(
        self,
        template: KernelTemplate,
        tensors: dict[str, Any],
        mutated: list[str],
        **constants: Any,
    ) -> IRNode:
        """One of the two stages that walk the chunks of a sequence."""
        tiles = self.tiles
        return _inductor.realize(
            template.call(
                tensors,
                self.token_layout(self.v, self.HV, self.V),
                [
                    Config.of(
                        tiles.warps_scan,
                        tiles.stages_scan,
                        BT=tiles.BT,
                        BK=tiles.BK,
                        BV=tiles.BV_SCAN,
                    )
                ],
                mutated=mutated,
                call_sizes=[self.N, self.HV, self.V],
                V=self.V,
                HAS_INITIAL_STATE=self.inputs["initial_state"] is not None,
                USE_DESCRIPTORS=self.use_descriptors,
                # A template's output has no name to make a descriptor of.
                USE_DESCRIPTOR_STORE=False,
                **self.flags,
                **constants,
            )
        )


def lower(
    do: IRNode,
    dfinal_state: IRNode | None,
    q: IRNode,
    k: IRNode,
    v: IRNode,
    g: IRNode | None = None,
    beta: IRNode | None = None,
    initial_state: IRNode | None = None,
    cu_seqlens: IRNode | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> Any:
    """``gdn::chunk_backward`` and ``gdn::recurrent_backward``."""
    supports(q, g)
    do, (q, k, v) = _inductor.contiguous(do), (_inductor.realize(x) for x in (q, k, v))
    if _is_call(do, q, k, v):
        log.debug("gdn_chunk_backward: stays a call of the operator: its kernels are in Gluon")
        return _inductor.captured_call(
            *(torch.ops.gdn.chunk_backward.default, do, dfinal_state, q, k, v),
            *(g, beta, initial_state, cu_seqlens),
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
        )
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state}
    inputs |= {"dfinal_state": dfinal_state, "cu_seqlens": cu_seqlens}
    inputs = {name: x and _inductor.realize(x) for name, x in inputs.items()}
    inputs["do"] = do
    call = _Call(inputs, scale, use_qk_l2norm)
    made = call.prepare()

    states = call.new(call.places, call.HV, call.V, call.K)
    call.use_descriptors = _use_descriptors(
        call.gpu,
        *(x for x in call.named("q", "k", "v", "do", states=states).values() if x is not None),
    )
    if call.use_descriptors and beta is not None:
        inputs["beta"] = _head_major(beta)
    names = ("k", "v", "beta", "initial_state", "cu_seqlens")
    u = call.scan(REPLAY, call.named(*names, **made, states=states), ["states"])

    dstates = call.new(call.places, call.HV, call.V, call.K)
    written: dict[str, IRNode | None] = {"dstates": dstates, "dinitial_state": None}
    if initial_state is not None:
        size = (call.N, call.HV, call.V, call.K)
        written["dinitial_state"] = call.new(*size, dtype=initial_state.get_dtype())
    tensors = call.named(*("do", "dfinal_state", "q", "k", "beta", "cu_seqlens"), **made, **written)
    mutated = [name for name, x in written.items() if x is not None]
    has_dfinal_state = dfinal_state is not None
    dr = call.scan(REVERSE, tensors, mutated, scale=call.scale, HAS_DFINAL_STATE=has_dfinal_state)

    gradients: dict[str, IRNode | None] = {
        "dk": call.new(*k.get_size()),
        "dv": call.new(*v.get_size()),
        "dg": g and call.new(*g.get_size(), dtype=torch.float32),
        "dbeta": beta and call.new(*beta.get_size(), dtype=beta.get_dtype()),
    }
    shared = {"G": made["G"], "states": states, "dstates": dstates, "u": u, "dr": dr}
    tiles = call.tiles
    sizes = {"BT": tiles.BT, "BK": tiles.BK, "BV": tiles.BV_GRADIENTS, "BN": PLACE_BN}
    sizes["BR"] = rows_of_heads(call.H, call.HV)
    dq = GRADIENTS.call(
        call.named("do", "q", "k", "v", "beta", "cu_seqlens", **shared, **gradients),
        call.token_layout(q, call.H, call.K),
        [Config.of(tiles.warps_gradients, tiles.stages_gradients, **sizes)],
        mutated=[name for name, x in gradients.items() if x is not None],
        call_sizes=[call.places, call.H],
        V=call.V,
        HAS_G=g is not None,
        scale=call.scale,
        **call.flags,
    )
    rest = (*gradients.values(), written["dinitial_state"])
    return dq, *(_inductor.as_result(call.new(0) if x is None else x) for x in rest)
