"""``chunk`` and ``chunk_`` as two templates, of ``gdn_ops/kernels/chunk_prepare.py`` and
``gdn_ops/kernels/chunk_scan.py``; where sequences are split, two more (chunk_segments.py)."""

from typing import Any

import torch
from torch.utils._sympy.functions import FloorDiv

from gdn_ops.kernels import chunk as kernels
from gdn_ops.kernels import chunk_prepare, chunk_prepared, chunk_scan
from gdn_ops.kernels.chunk_segments import WHOLE
from gdn_ops.kernels.configs import Gpu

from . import _inductor, chunk_segments, timing
from ._inductor import IRNode, Unsupported
from .chunk_choice import Choice, choose
from .prologue import GATES, Computed, take_computed
from .template import Config, KernelTemplate, require_cuda


@_inductor.symbolic_grid
def prepare_grid(places: Any, value_heads: Any, meta: dict[str, Any]) -> Any:
    return (places * (value_heads // meta["HEADS"]), 1, 1)


@_inductor.symbolic_grid
def scan_grid(sequences: Any, value_heads: Any, V: Any, meta: dict[str, Any], *, cdiv: Any) -> Any:
    return (sequences * value_heads * cdiv(V, meta["BV"]), 1, 1)


PREPARE = KernelTemplate(
    "gdn_chunk_prepare",
    chunk_prepare.prepare_kernel,
    prepare_grid,
    axes=chunk_prepare.AXES,
    sizes=chunk_prepare.SIZES,
    tile=("BT", "BT"),
    output="inverse",
)
SCAN = KernelTemplate(
    "gdn_chunk_scan",
    chunk_scan.scan_kernel,
    scan_grid,
    axes=chunk_scan.AXES,
    sizes=chunk_scan.SIZES,
    tile=("BT", "BV"),
)


def supports(q: IRNode, g: IRNode | None) -> None:
    """Raise for a call that the kernels cannot serve.

    Raises:
        Unsupported: with the reason.
    """
    require_cuda(q)
    if q.get_dtype() == torch.float64:
        raise Unsupported("the kernels compute in float32; pass q in a smaller dtype")
    if g is not None and len(g.get_size()) == 4:
        raise Unsupported(
            "the kernels have one decay per head; pass g of shape [B, T, HV], or call recurrent or "
            "recurrent_, whose kernel takes one per key channel"
        )


def _call(
    tensors: dict[str, IRNode | None],
    gates: dict[str, Computed],
    choice: Choice,
    scale: float | None,
    use_qk_l2norm: bool,
    null_index: int,
    in_place: bool,
) -> Any:
    """Add the kernels to the graph; returns ``o``."""
    q, k, v, bounds = (tensors[name] for name in ("q", "k", "v", "cu_seqlens"))
    assert q is not None
    assert k is not None
    assert v is not None
    B, T, H, K = q.get_size()
    HV, V = v.get_size()[2:]
    H, K, HV, V = (_inductor.static_int(size) for size in (H, K, HV, V))
    # Packed rows have one sequence more, the tokens of none.
    sequences = B if bounds is None else bounds.get_size()[0]
    dtype = q.get_dtype()
    gpu, tiles, use_descriptors, is_late, split, _ = choice
    constants: dict[str, Any] = {
        "H": H,
        "HV": HV,
        "K": K,
        "IS_VARLEN": bounds is not None,
        "USE_QK_L2NORM": use_qk_l2norm,
        "DOT": str(dtype).replace("torch", "tl"),
        "PRECISION": repr(chunk_prepared.PRECISION),
    }
    generators = timing.of_rows(q, bounds, tensors["state_indices"])
    _add_prepare(tensors, gates, tiles, gpu, constants, generators)
    constants |= {"USE_DESCRIPTORS": use_descriptors}
    if split != WHOLE:
        tensors["segment_states"] = chunk_segments.enter_segments(
            tensors, split, tiles, gpu, null_index, constants, generators
        )
        sequences = chunk_segments.places(v, bounds, tiles.BT, split) * B
        sequences += 0 if bounds is None else 1
        if not in_place:
            tensors["state"] = None  # the scan does not read it
    mutated = ["state" if in_place else "final_state"]
    shape = [B, T, HV, V]
    # New and contiguous, it fits a descriptor where v does.
    stored = _inductor.new_buffer(v, shape, dtype) if is_late else None
    if is_late:
        tensors["o"] = stored
        mutated.append("o")
        # A template has an output of its own, which here nobody writes or reads, nor allocates.
        shape = [1] * len(shape)
    own = SCAN.call(
        {name: tensors[name] for name in chunk_scan.AXES if name in tensors},
        _inductor.contiguous_layout(v, shape, dtype),
        _scan_configs(tiles, dtype, is_late),
        mutated=mutated,
        aliases={"final_state": "state"} if in_place else None,
        call_sizes=[sequences, HV, V],
        generators=generators,
        scale=K**-0.5 if scale is None else scale,
        null_index=null_index,
        V=V,
        HAS_STATE=tensors["state"] is not None,
        HAS_INDICES=tensors["state_indices"] is not None,
        HAS_READ_INDICES=tensors["read_indices"] is not None,
        HAS_INITIAL_STATE=tensors["has_initial_state"] is not None,
        IS_POOL=in_place,
        HAS_KEPT=False,
        HAS_SEGMENT_STATES=split.has_maps,
        USE_DESCRIPTOR_STORE=is_late,
        STORES_FIRST=gpu.is_tight,
        INDEX="tl.int32" if _inductor.is_known(B * T * HV * V < 2**31) else "tl.int64",
        **constants,
        **split.constants(),
    )
    return own if stored is None else _inductor.as_result(stored)


def _add_prepare(
    tensors: dict[str, IRNode | None],
    gates: dict[str, Computed],
    tiles: kernels.Tiles,
    gpu: Gpu,
    constants: dict[str, Any],
    generators: dict[str, Any],
) -> None:
    """Put what ``prepare_kernel`` makes of q, k, g and beta in place of g and beta."""
    g, beta, bounds = tensors.pop("g"), tensors.pop("beta"), tensors["cu_seqlens"]
    q = tensors["q"]
    assert q is not None
    B, T = q.get_size()[:2]
    H, HV, dtype = constants["H"], constants["HV"], q.get_dtype()
    chunks = FloorDiv(T + tiles.BT - 1, tiles.BT)
    places = B * chunks if bounds is None else chunks + bounds.get_size()[0] - 1
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    rows = chunk_prepared.rows_of_decays(constants["USE_QK_L2NORM"], is_scaled=True)
    weights = _inductor.new_buffer(q, [B, T, HV, tiles.BT], dtype)
    G = _inductor.new_buffer(q, [places, HV, rows, tiles.BT], wide)
    inputs = {"q": q, "k": tensors["k"], "g": g, "beta": beta, "cu_seqlens": bounds}
    inverse = PREPARE.call(
        {**inputs, "G": G, "weights": weights},
        _inductor.contiguous_layout(q, [B, T, HV, tiles.BT], dtype),
        [prepare_config(dtype, gpu, tiles.BT, tiles.BK, H, HV, places)],
        mutated=["G", "weights"],
        computed=gates,
        call_sizes=[places, HV],
        generators=generators,
        HAS_G=g is not None or "g" in gates,
        HAS_BETA=beta is not None or "beta" in gates,
        IS_SCALED=True,
        **chunk_prepared.ALONE,
        **constants,
    )
    tensors |= {"inverse": _inductor.realize(inverse), "weights": weights, "decays": G}


def prepare_config(
    dtype: torch.dtype, gpu: Gpu, BT: int, BK: int, H: int, HV: int, places: Any
) -> Config:
    """What the launcher of ``prepare_kernel`` chooses."""
    [chunks] = _inductor.hints([places])
    choice = chunk_prepared.prepare_choice(dtype, gpu, BK, H, HV, chunks)._asdict()
    sizes = {"BT": BT, "BK": BK, "BN": chunk_prepared.PREPARE_BN}
    return Config.of(choice.pop("num_warps"), 1, **sizes, **choice)


def _scan_configs(tiles: kernels.Tiles, dtype: torch.dtype, is_late: bool) -> list[Config]:
    choices = [(tiles.BV, tiles.num_warps, tiles.num_stages)]
    # Of float32 and of long keys no others fit.
    if _inductor.may_autotune() and dtype != torch.float32 and tiles.BK <= 128:
        others = [(64, 4, 2), (64, 4, 3), (32, 4, 2), (32, 4, 3)]
        if is_late:
            others = [(64, 4, 3)]  # of 32 rows it spills with Triton 3.6.0
        choices += [c for c in others if c[0] <= tiles.BV and c not in choices]
    sizes = {"BT": tiles.BT, "BK": tiles.BK}
    return [Config.of(warps, stages, BV=BV, **sizes) for BV, warps, stages in choices]


def lower(
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
    """``gdn::chunk``."""
    supports(q, g)
    q, k, v = (_inductor.realize(x) for x in (q, k, v))
    choice = choose(q, k, v, cu_seqlens, in_place=False)
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": initial_state}
    inputs["cu_seqlens"] = cu_seqlens
    if choice.is_call:
        options = {"scale": scale, "use_qk_l2norm": use_qk_l2norm}
        return _inductor.captured_call(torch.ops.gdn.chunk.default, *inputs.values(), **options)
    N = q.get_size()[0] if cu_seqlens is None else cu_seqlens.get_size()[0] - 1
    HV, V, K = (_inductor.static_int(x) for x in (*v.get_size()[2:], q.get_size()[3]))
    dtype = torch.float32 if initial_state is None else initial_state.get_dtype()
    final_state = _inductor.new_buffer(v, [N, HV, V, K], dtype)
    inputs, gates = take_computed(inputs, GATES, 3, final_state)
    tensors = {name: x and _inductor.realize(x) for name, x in inputs.items()}
    tensors |= dict.fromkeys(("state_indices", "has_initial_state", "read_indices"))
    tensors["final_state"] = final_state
    o = _call(tensors, gates, choice, scale, use_qk_l2norm, -1, in_place=False)
    return o, _inductor.as_result(final_state)


def lower_(
    q: IRNode,
    k: IRNode,
    v: IRNode,
    g: IRNode | None,
    beta: IRNode | None,
    state: IRNode,
    state_indices: IRNode | None,
    has_initial_state: IRNode | None = None,
    cu_seqlens: IRNode | None = None,
    read_indices: IRNode | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    null_index: int = -1,
) -> Any:
    """``gdn::chunk_``."""
    supports(q, g)
    q, k, v = (_inductor.realize(x) for x in (q, k, v))
    choice = choose(q, k, v, cu_seqlens, in_place=True)
    if choice.is_call:
        rows = (state_indices, has_initial_state, cu_seqlens, read_indices)
        return _inductor.captured_call(
            *(torch.ops.gdn.chunk_.default, q, k, v, g, beta, state, *rows),
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
            null_index=null_index,
        )
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state_indices": state_indices}
    inputs |= {"has_initial_state": has_initial_state, "cu_seqlens": cu_seqlens}
    inputs["read_indices"] = read_indices
    state = _inductor.realize_in_place(state, "state")
    inputs, gates = take_computed(inputs, GATES, 3, state)
    tensors = {name: x and _inductor.realize(x) for name, x in inputs.items()}
    tensors["state"] = state
    return _call(tensors, gates, choice, scale, use_qk_l2norm, null_index, in_place=True)
