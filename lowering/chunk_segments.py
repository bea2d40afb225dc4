"""Long sequences in segments: the templates of ``gdn_ops/kernels/chunk_carry.py`` and
``gdn_ops/kernels/chunk_chain.py``, between those of ``lowering/chunk.py``."""

from collections.abc import Callable, Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]  # it has no stubs
import torch
from torch.utils._sympy.functions import FloorDiv, Max

from gdn_ops.kernels import chunk_carry, chunk_chain, chunk_segments
from gdn_ops.kernels.chunk import Tiles
from gdn_ops.kernels.chunk_segments import Split
from gdn_ops.kernels.configs import Gpu, cdiv

from . import _inductor
from ._inductor import IRNode
from .template import Config, KernelTemplate

# Tokens that a call of unknown length is expected to have: the longer its sequences, the more there
# is to save, and a short one takes some 5 us more.
LONG = 4096


@_inductor.symbolic_grid
def carry_grid(
    places: Any, value_heads: Any, K: Any, V: Any, meta: dict[str, Any], *, cdiv: Any
) -> Any:
    tiles = cdiv(V, meta["BV"]) + cdiv(K, meta["BV"])
    return (places * value_heads * tiles, 1, 1)


@_inductor.symbolic_grid
def chain_grid(sequences: Any, value_heads: Any, V: Any, meta: dict[str, Any], *, cdiv: Any) -> Any:
    return (sequences * value_heads * cdiv(V, meta["BV"]), 1, 1)


CARRY = KernelTemplate(
    "gdn_chunk_carry",
    chunk_carry.carry_kernel,
    carry_grid,
    axes=chunk_carry.AXES,
    sizes=chunk_carry.SIZES,
    tile=("BV", "BK"),
    output="carry",
)
CHAIN = KernelTemplate(
    "gdn_chunk_chain",
    chunk_chain.chain_kernel,
    chain_grid,
    axes=chunk_chain.AXES,
    sizes=chunk_chain.SIZES,
    tile=("BV", "BK"),
    output="segment_states",
)


def expected(v: IRNode, cu_seqlens: IRNode | None) -> tuple[int, int, int]:
    """Rows, sequences and tokens of a row, as far as they are known, else as they may be."""
    B, T = v.get_size()[:2]
    N = B if cu_seqlens is None else cu_seqlens.get_size()[0] - 1
    rows, sequences, tokens = _inductor.hints([B, N, T])
    if not _inductor.is_known(sympy.Eq(T, tokens)):
        tokens = max(tokens, LONG * sequences // rows)
    return rows, sequences, tokens


def choose(v: IRNode, cu_seqlens: IRNode | None, tiles: Tiles, gpu: Gpu) -> Split:
    """How to split the sequences of a call; templates have no other way than by maps."""
    rows, sequences, tokens = expected(v, cu_seqlens)
    HV, V = (_inductor.static_int(size) for size in v.get_size()[2:])
    chunks = rows * cdiv(tokens, tiles.BT)
    sizes = (sequences, chunks, HV, V, tiles.BK, tiles.BV)
    return chunk_segments.choose(*sizes, v.get_dtype(), gpu, needs_maps=True, is_template=True)


def places(v: IRNode, cu_seqlens: IRNode | None, BT: int, split: Split) -> Any:
    """``Split.places`` of sizes that need not be numbers."""
    B, T = v.get_size()[:2]
    chunks = FloorDiv(T + BT - 1, BT)
    length = Max(FloorDiv(chunks * B + split.SEGMENTS - 1, split.SEGMENTS), split.LEAST)
    packed = 0 if cu_seqlens is None else cu_seqlens.get_size()[0] - 1
    return FloorDiv(chunks + length - 1, length) + packed


def enter_segments(
    tensors: Mapping[str, IRNode | None],
    split: Split,
    tiles: Tiles,
    gpu: Gpu,
    null_index: int,
    constants: Mapping[str, Any],
    generators: Mapping[str, Callable[[Any], Any]],
) -> IRNode:
    """Add both kernels to the graph; returns ``segment_states``.

    Args:
        tensors: By the kernels' names.
        split: Of the call.
        tiles: Of the scan.
        gpu: The GPU.
        null_index: Of the call.
        constants: Numbers of the model and flags, by name.
        generators: For timing.
    """
    k, v, state, bounds = (tensors[name] for name in ("k", "v", "state", "cu_seqlens"))
    assert k is not None
    assert v is not None
    B, _, HV, V = v.get_size()
    HV, V, K = (_inductor.static_int(size) for size in (HV, V, k.get_size()[3]))
    count = places(v, bounds, tiles.BT, split)
    shared: dict[str, Any] = {"HV": HV, "K": K, "V": V, "IS_VARLEN": bounds is not None}
    # Gates may be computed in prepare alone, so no template looks at what is forgotten.
    shared |= {"HAS_KEPT": False, **split.constants()}
    carry = CARRY.call(
        {name: tensors.get(name) for name in chunk_carry.AXES if name != CARRY.output},
        _inductor.contiguous_layout(v, [B, count, HV, V + K, K], torch.float32),
        [_config(chunk_segments.carry_tiles(tiles.BV, gpu), tiles)],
        call_sizes=[B * count, HV, K, V],
        generators=generators,
        **{name: constants[name] for name in ("H", "USE_QK_L2NORM", "USE_DESCRIPTORS")},
        **{name: constants[name] for name in ("DOT", "PRECISION")},
        **shared,
    )
    inputs = {name: tensors.get(name) for name in chunk_chain.AXES if name != CHAIN.output}
    entered = CHAIN.call(
        inputs | {"carry": _inductor.realize(carry)},
        _inductor.contiguous_layout(v, [B, count, HV, V, K], torch.float32),
        [_config(chunk_segments.chain_tiles(gpu), tiles)],
        call_sizes=[B if bounds is None else bounds.get_size()[0] - 1, HV, V],
        generators=generators,
        null_index=null_index,
        HAS_STATE=state is not None,
        HAS_INDICES=tensors["state_indices"] is not None,
        HAS_READ_INDICES=tensors["read_indices"] is not None,
        HAS_INITIAL_STATE=tensors["has_initial_state"] is not None,
        PRECISION=repr(chunk_segments.chain_precision(gpu)),
        **shared,
    )
    return _inductor.realize(entered)


def _config(own: chunk_segments.Tiles, tiles: Tiles) -> Config:
    return Config.of(own.num_warps, own.num_stages, BT=tiles.BT, BK=tiles.BK, BV=own.BV)
