"""How a prefill is compiled: tiles, where its output is stored, and by which kernels."""

import logging
from typing import NamedTuple

import sympy  # type: ignore[import-untyped]  # it has no stubs
import torch

from gdn_ops.kernels import chunk as kernels
from gdn_ops.kernels.chunk_fused import is_faster
from gdn_ops.kernels.chunk_hopper import pick_scan
from gdn_ops.kernels.chunk_scan import scan_kernel
from gdn_ops.kernels.chunk_segments import WHOLE, Split
from gdn_ops.kernels.configs import Gpu, gpu_at

from . import _inductor, chunk_segments, epilogue
from ._inductor import IRNode

log = logging.getLogger(__name__)

# Tokens from which on kernels in Gluon save more than gates cost that are computed before them: of
# whole sequences, and of split ones. us of the gates and the operator with l2 norm, 16 key heads,
# 32 value heads, sequences x tokens, templates / call (H200, Triton 3.6, 2026-11-30; with copies of
# the inputs into a CUDA graph, some 25 us for each 2048 tokens):
#
#     1x512      1x1024     1x8192     4x2048     8x1024     64x128     4x8192     1x32768
#     49 / 48    72 / 67    355 / 324  269 / 227  281 / 239  455 / 442  943 / 780  1255 / 1203
#
# With 4 key heads and 8 value heads, 1x8192 takes 142 / 143 and 1x32768 385 / 379.
CALL_WHOLE, CALL_SPLIT = 1024, 16384


class Choice(NamedTuple):
    """What is known before the first kernel of a call is added to the graph."""

    gpu: Gpu
    tiles: kernels.Tiles
    use_descriptors: bool
    is_late: bool  # the output is stored a chunk later, by a descriptor
    split: Split
    is_call: bool  # of the operator, whose kernels in Gluon are no templates


def choose(q: IRNode, k: IRNode, v: IRNode, bounds: IRNode | None, in_place: bool) -> Choice:
    """The choice for tokens that are in memory, by their sizes and by what follows."""
    HV, V, K = (_inductor.static_int(x) for x in (*v.get_size()[2:], q.get_size()[3]))
    # Packed rows have one sequence more, the tokens of none.
    sequences = (q if bounds is None else bounds).get_size()[0]
    dtype = q.get_dtype()
    gpu = gpu_at(_inductor.device(q).index or 0)
    walked = _inductor.hints([sequences])[0]
    fit = all(fits_descriptor(x) for x in (q, k, v))
    use_descriptors = gpu.has_descriptors and dtype != torch.float32 and fit
    why_pointers = _why_pointers(in_place, use_descriptors)
    tiles = kernels.pick(K, V, dtype, walked * HV, gpu, why_pointers is None)
    if why_pointers is None and not kernels.stores_late(tiles, gpu):
        why_pointers = f"K = {K} on {gpu.arch} leaves no room for its tile"
    is_late = why_pointers is None
    split = chunk_segments.choose(v, bounds, tiles, gpu)
    is_call = is_late and _is_call(q, v, bounds, tiles, split, gpu)
    _tell(why_pointers, split, is_call)
    return Choice(gpu, tiles, use_descriptors, is_late, split, is_call)


def _is_call(
    q: IRNode, v: IRNode, bounds: IRNode | None, tiles: kernels.Tiles, split: Split, gpu: Gpu
) -> bool:
    """Whether the operator would run on kernels in Gluon, and is the faster choice."""
    if _inductor.is_packaged():
        return False  # its code runs without Python
    HV, V, K = (_inductor.static_int(x) for x in (*v.get_size()[2:], q.get_size()[3]))
    rows, sequences, tokens = chunk_segments.expected(v, bounds)
    if rows * tokens < (CALL_WHOLE if split == WHOLE else CALL_SPLIT):
        return False
    heads = sequences * HV
    scan, *_ = pick_scan(tiles, K, V, heads, gpu, True)
    return scan is not scan_kernel or is_faster(K, V, q.get_dtype(), heads, gpu)


def _tell(why_pointers: str | None, split: Split, is_call: bool) -> None:
    if is_call:
        log.debug("gdn_chunk: stays a call of the operator: its kernels in Gluon are faster")
        return
    how = "by a descriptor: nothing can be fused into the store"
    if why_pointers is not None:
        how = f"through pointers: {why_pointers}"
    log.debug("gdn_chunk_scan: o is stored %s", how)
    if split != WHOLE:
        log.debug("gdn_chunk_scan: sequences are walked in up to %d segments", split.SEGMENTS)


def fits_descriptor(x: IRNode) -> bool:
    """Whether every row of every head is known to start and end at a multiple of 16 bytes."""
    count = 16 // x.get_dtype().itemsize
    sizes, (batch, tokens, heads, inner) = x.get_size(), x.get_stride()
    known = (
        sympy.Eq(inner, 1),
        *(sympy.Eq(n % count, 0) for n in (sizes[3], x.get_layout().offset)),
    )
    # Rows that fit make a batch of whole rows fit.
    is_whole = sympy.And(sympy.Ne(tokens, 0), sympy.Eq(batch, sizes[1] * tokens))
    return (
        all(_inductor.is_known(relation) for relation in known)
        and all(_inductor.is_multiple(step, count, sizes) for step in (tokens, heads))
        and (_inductor.is_known(is_whole) or _inductor.is_multiple(batch, count, sizes))
        and _inductor.is_aligned(x)
    )


def _why_pointers(in_place: bool, use_descriptors: bool) -> str | None:
    """Why the output is stored where Inductor can fuse into the store; None where it need not."""
    if not use_descriptors:
        return "its inputs are not read by descriptors"
    operator = torch.ops.gdn.chunk_ if in_place else torch.ops.gdn.chunk
    node = _inductor.node_of(operator.default)
    if node is None:
        return "what follows is not known"
    fused = epilogue.may_be_fused(node)
    return None if fused is None else f"{fused} may be fused into the store"
