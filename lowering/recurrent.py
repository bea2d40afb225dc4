"""``recurrent`` and ``recurrent_`` as one template, that of ``gdn_ops/kernels/recurrent.py``.

A few tokens with one write of the state are another, of ``gdn_ops/kernels/recurrent_verify.py``.
"""

from typing import Any

import torch

from gdn_ops.kernels import recurrent as kernels
from gdn_ops.kernels import recurrent_verify as verify
from gdn_ops.kernels.configs import VerifyTiles, next_power_of_2, recurrent_tiles, verify_tiles

from . import _inductor, timing
from ._inductor import IRNode, Unsupported
from .prologue import GATES, Computed, take_computed
from .template import Config, KernelTemplate, require_cuda


@_inductor.symbolic_grid
def grid(sequences: Any, value_heads: Any, V: Any, meta: dict[str, Any], *, cdiv: Any) -> Any:
    return (sequences * value_heads * cdiv(V, meta["BV"]), 1, 1)


TEMPLATE = KernelTemplate(
    "gdn_recurrent",
    kernels.recurrent_kernel,
    grid,
    axes=kernels.AXES,
    sizes=kernels.SIZES,
    tile=("BV",),
)
VERIFY = KernelTemplate(
    "gdn_recurrent_verify",
    verify.recurrent_verify_kernel,
    grid,
    axes=verify.AXES,
    sizes=verify.SIZES,
    tile=("BV", "BR"),
    in_place=("state",),
)


def supports(q: IRNode) -> None:
    """Raise for a call that the kernel cannot serve.

    Raises:
        Unsupported: with the reason.
    """
    require_cuda(q)
    if q.get_dtype() == torch.float64:
        raise Unsupported("the kernels compute in float32; pass q in a smaller dtype")


def _configs(K: int, V: int, state: IRNode, heads: int | None) -> list[Config]:
    tiles = recurrent_tiles(K, V, state.get_dtype().itemsize, heads)
    choices = [(tiles.BV, tiles.num_warps)]
    if _inductor.may_autotune():
        choices += [(b, w) for b, w in ((2 * tiles.BV, 1), (4 * tiles.BV, 2)) if b <= V]
    fixed = {"STREAM": tiles.stream, "BK": next_power_of_2(K)}
    return [Config.of(w, 1, BV=b, **fixed) for b, w in choices]


def _known(sizes: list[Any]) -> list[int] | None:
    """Sizes as numbers; None where one is a symbol."""
    numbers = _inductor.hints(sizes)
    is_known = all(_inductor.is_known(x == n) for x, n in zip(sizes, numbers, strict=True))
    return numbers if is_known else None


def _call(
    tensors: dict[str, IRNode | None],
    computed: dict[str, Computed],
    scale: float | None,
    use_qk_l2norm: bool,
    null_index: int,
    exact: bool,
    in_place: bool,
) -> Any:
    """Add the kernel to the graph; returns ``o``."""
    q, v, g = tensors["q"], tensors["v"], tensors["g"]
    cu_seqlens, table = tensors["cu_seqlens"], tensors["state_indices"]
    assert q is not None
    assert v is not None
    B, T, H, K = q.get_size()
    HV, V = v.get_size()[2:]
    H, K, HV, V = (_inductor.static_int(size) for size in (H, K, HV, V))
    is_table = table is not None and len(table.get_size()) == 2
    written = tensors["state" if in_place else "final_state"]
    assert written is not None
    # Packed rows have one sequence more, the tokens of none.
    sequences = B if cu_seqlens is None else cu_seqlens.get_size()[0]
    # One code for every batch has the tile that is good for most of them.
    known = None if exact or is_table else _known([sequences])
    heads = None if known is None else known[0] * HV
    return TEMPLATE.call(
        tensors,
        _inductor.contiguous_layout(v, [B, T, HV, V], v.get_dtype()),
        _configs(K, V, written, heads),
        mutated=["state" if in_place else "final_state"],
        aliases={"final_state": "state"} if in_place else None,
        computed=computed,
        call_sizes=[sequences, HV, V],
        generators=timing.of_rows(q, cu_seqlens, table),
        scale=K**-0.5 if scale is None else scale,
        null_index=null_index,
        H=H,
        HV=HV,
        K=K,
        V=V,
        S=_inductor.static_int(table.get_size()[1]) if table is not None and is_table else 1,
        USE_QK_L2NORM=use_qk_l2norm,
        HAS_G=g is not None or "g" in computed,
        HAS_G_PER_KEY=g is not None and len(g.get_size()) == 4,
        HAS_BETA=tensors["beta"] is not None or "beta" in computed,
        HAS_STATE=tensors["state"] is not None,
        IS_POOL=in_place,
        HAS_INDICES=table is not None,
        IS_TABLE=is_table,
        HAS_ACCEPTED=tensors["num_accepted_tokens"] is not None,
        HAS_READ_INDICES=tensors["read_indices"] is not None,
        IS_VARLEN=cu_seqlens is not None,
        EXACT=exact,
    )


def _verify_tiles(tensors: dict[str, IRNode | None]) -> VerifyTiles | None:
    """The tiles of a call that is not exact; None where the other kernel is for it."""
    q, g, state, table = (tensors[name] for name in ("q", "g", "state", "state_indices"))
    assert q is not None
    assert state is not None
    ranks = [0 if x is None else len(x.get_size()) for x in (table, g)]
    if ranks[0] == 2 or ranks[1] == 4:
        return None
    bounds = tensors["cu_seqlens"]
    sizes = [q.get_size()[1], *(() if bounds is None else bounds.get_size())]
    numbers = _known(sizes)
    if numbers is None:
        return None  # one code for every length
    rows = None if bounds is None else numbers[1] - 1
    K = _inductor.static_int(q.get_size()[3])
    return verify_tiles(K, numbers[0], rows, state.get_dtype(), q.get_dtype())


def _call_verify(
    tensors: dict[str, IRNode | None],
    computed: dict[str, Computed],
    tiles: VerifyTiles,
    scale: float | None,
    use_qk_l2norm: bool,
    null_index: int,
) -> Any:
    """Add the kernel for a few tokens to the graph; returns ``o``."""
    q, v, bounds = tensors["q"], tensors["v"], tensors["cu_seqlens"]
    assert q is not None
    assert v is not None
    B, T, H, K = q.get_size()
    HV, V = v.get_size()[2:]
    H, K, HV, V = (_inductor.static_int(size) for size in (H, K, HV, V))
    constants = tiles._asdict()
    num_warps = constants.pop("num_warps")
    return VERIFY.call(
        {name: tensors[name] for name in verify.AXES if name != "o"},
        _inductor.contiguous_layout(v, [B, T, HV, V], v.get_dtype()),
        [Config.of(num_warps, 1, **constants)],
        mutated=["state"],
        computed=computed,
        call_sizes=[B if bounds is None else bounds.get_size()[0], HV, V],
        scale=K**-0.5 if scale is None else scale,
        null_index=null_index,
        H=H,
        HV=HV,
        K=K,
        V=V,
        USE_QK_L2NORM=use_qk_l2norm,
        HAS_G=tensors["g"] is not None or "g" in computed,
        HAS_BETA=tensors["beta"] is not None or "beta" in computed,
        HAS_INDICES=tensors["state_indices"] is not None,
        HAS_READ_INDICES=tensors["read_indices"] is not None,
        IS_VARLEN=bounds is not None,
    )


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
    """``gdn::recurrent``."""
    supports(q)
    N = q.get_size()[0] if cu_seqlens is None else cu_seqlens.get_size()[0] - 1
    HV, V, K = (_inductor.static_int(x) for x in (*v.get_size()[2:], q.get_size()[3]))
    dtype = torch.float32 if initial_state is None else initial_state.get_dtype()
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": initial_state}
    inputs["cu_seqlens"] = cu_seqlens
    final_state = _inductor.new_buffer(v, [N, HV, V, K], dtype)
    inputs, computed = take_computed(inputs, GATES, 3, final_state)
    tensors = {name: x and _inductor.realize(x) for name, x in inputs.items()}
    absent = ("state_indices", "num_accepted_tokens", "read_indices")
    tensors |= dict.fromkeys(absent)
    tensors["final_state"] = final_state
    o = _call(tensors, computed, scale, use_qk_l2norm, -1, exact=False, in_place=False)
    return o, _inductor.as_result(final_state)


def lower_(
    q: IRNode,
    k: IRNode,
    v: IRNode,
    g: IRNode | None,
    beta: IRNode | None,
    state: IRNode,
    state_indices: IRNode | None = None,
    num_accepted_tokens: IRNode | None = None,
    cu_seqlens: IRNode | None = None,
    read_indices: IRNode | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    null_index: int = -1,
    exact: bool = False,
) -> Any:
    """``gdn::recurrent_``."""
    supports(q)
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state_indices": state_indices}
    inputs |= {"num_accepted_tokens": num_accepted_tokens, "cu_seqlens": cu_seqlens}
    inputs["read_indices"] = read_indices
    state = _inductor.realize_in_place(state, "state")
    tiles = None if exact else _verify_tiles(inputs | {"state": state})
    # Exact bits of a token do not depend on what a kernel's compiler makes of its gates.
    taken, computed = (inputs, {}) if exact else take_computed(inputs, GATES, 3, state)
    tensors = {name: x and _inductor.realize(x) for name, x in taken.items()}
    tensors["state"] = state
    if tiles is not None:
        return _call_verify(tensors, computed, tiles, scale, use_qk_l2norm, null_index)
    return _call(tensors, computed, scale, use_qk_l2norm, null_index, exact, in_place=True)
