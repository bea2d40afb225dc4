"""Splitting long sequences into segments that are walked side by side: when, and the launches.

The scan of one sequence has few programs, one after another chunk. Split, each segment is walked
twice: ``carry_kernel`` (chunk_carry.py) finds what it does to the state that enters it,
``chain_kernel`` (chunk_chain.py) which state that is, and then the scan walks all of them at once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunk_carry import carry_kernel
from .chunk_chain import chain_kernel
from .configs import Gpu, cdiv
from .launch import launch, strides

# us on an H200 (Triton 3.6, 2026-11-29), K = V = 128 and bfloat16: a chunk in the scan, a chunk in
# the carry where two programs share a multiprocessor and where one has it, a segment in the chain,
# and what both launches take beside that.
SCAN, CARRY, CARRY_ALONE, CHAIN, START = 1.27, 1.4, 1.0, 2.55, 9.0
# Chunks of a segment, at least. Of 128 chunks those of 8, 12 and 16 take the same time.
LEAST = 12
# Bounds that are read at once.
BN = 128
# log2 of what is kept of a state that counts as nothing: float32 has 24 digits, and 126 powers of 2
# below 1. Chunks before the end of a segment in which it is looked for.
FORGOTTEN, LOOK = -64.0, 128


class Split(NamedTuple):
    """Segments that the chunks of a call are split into, about, and the fewest chunks of one."""

    SEGMENTS: int
    LEAST: int

    def places(self, T: int, B: int, BT: int, packed: int | None) -> int:
        """Places of segments of a row of the batch, or of so many ``packed`` sequences."""
        chunks = max(cdiv(cdiv(T, BT) * B, self.SEGMENTS), self.LEAST)
        return cdiv(T, BT * chunks) + (packed or 0)


# No split: what the scan is told of a call whose sequences are whole.
WHOLE = Split(1, 0)


def choose(
    N: int, chunks: int, HV: int, V: int, BK: int, BV: int, dtype: torch.dtype, gpu: Gpu
) -> Split:
    """How to split the sequences of a call, by what it takes.

    As many segments as there are multiprocessors for, where that is faster. us for whole sequences
    and for split ones, prepare included (H200, Triton 3.6, 2026-11-29):

        value heads         4      8     16     32
        2048 tokens      66/65  63/61  71/74  83/102
        8192           191/96  199/113  221/168  264/266
        32768          692/193  731/291  810/514  977/913

    Args:
        N: Sequences.
        chunks: Of all sequences.
        HV: Value heads.
        V: Value size.
        BK: Key size, padded.
        BV: Rows of a program of the scan.
        dtype: Of the tokens; float32 is not split, which nobody measured.
        gpu: The GPU.
    """
    programs = HV * cdiv(V, BV)
    segments, length = gpu.multiprocessors // programs, chunks // N
    each = min(segments // N, length // LEAST)
    # The carry of 256 keys would need more shared memory than there is.
    if BK > 128 or dtype == torch.float32 or each < 2:
        return WHOLE
    is_alone = 2 * programs * N * (each - 1) <= gpu.multiprocessors
    walked = length / each
    rounds = cdiv(N * HV * cdiv(V, chain_tiles(gpu).BV), gpu.multiprocessors)
    cost = walked * (CARRY_ALONE if is_alone else CARRY) + CHAIN * each * rounds + START
    return Split(segments, LEAST) if SCAN * (length - walked) > cost else WHOLE


class Tiles(NamedTuple):
    """Rows of a program, its warps and the stages of its loop."""

    BV: int
    num_warps: int
    num_stages: int


def carry_tiles(BV: int, gpu: Gpu) -> Tiles:
    """Rows as in the scan, which has ``BV``, with less shared memory and no store to make late."""
    return Tiles(BV, 4, 3 if gpu.has_descriptors else 2)


def chain_tiles(gpu: Gpu) -> Tiles:
    """Eight warps, since a thread of four would hold 256 numbers of a product's operand.

    One stage before sm_90: of two Triton 3.8 makes three, more than sm_89 has shared memory for.
    """
    return Tiles(16, 8, 2 if gpu.has_descriptors else 1)


def chain_precision(gpu: Gpu) -> str:
    """``input_precision`` of the products of states, which are float32: of three TF32, or exact."""
    return "tf32x3" if gpu.arch.startswith("sm_") else "ieee"


def enter_segments(
    k: Tensor,
    v: Tensor,
    inverse: Tensor,
    decays: Tensor,
    kept: Tensor,
    state: Tensor | None,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read_indices: Tensor | None,
    *,
    null_index: int,
    split: Split,
    tiles: Any,
    constants: dict[str, Any],
    gpu: Gpu,
) -> Tensor:
    """``segment_states`` of chunk_chain.py."""
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    places = split.places(T, B, tiles.BT, None if cu_seqlens is None else N)
    carry = torch.empty((B, places, HV, V + K, K), dtype=torch.float32, device=k.device)
    states = torch.empty((B, places, HV, V, K), dtype=torch.float32, device=k.device)
    carry_tile = carry_tiles(tiles.BV, gpu)
    chain_tile = chain_tiles(gpu)
    sizes = {
        "BT": tiles.BT,
        "BK": tiles.BK,
        "HV": HV,
        "K": K,
        "V": V,
        "IS_VARLEN": cu_seqlens is not None,
        **split._asdict(),
    }
    launch(
        carry_kernel,
        B * places * HV * (cdiv(V, carry_tile.BV) + cdiv(K, carry_tile.BV)),
        (k, v, inverse, decays, kept, cu_seqlens, carry),
        (*k.stride(), *v.stride(), *strides(cu_seqlens, 1), *carry.stride(), T, B),
        H=H,
        FORGOTTEN=FORGOTTEN,
        BN=BN,
        LOOK=LOOK,
        **carry_tile._asdict(),
        **sizes,
        **constants,
    )
    launch(
        chain_kernel,
        N * HV * cdiv(V, chain_tile.BV),
        (carry, inverse, state, state_indices, has_initial_state, cu_seqlens, read_indices, states),
        (
            *carry.stride(),
            *strides(state, 4),
            *strides(state_indices, 1),
            *strides(has_initial_state, 1),
            *strides(cu_seqlens, 1),
            *strides(read_indices, 1),
            *states.stride(),
            T,
            B,
        ),
        null_index=null_index,
        HAS_STATE=state is not None,
        HAS_INDICES=state_indices is not None,
        HAS_READ_INDICES=read_indices is not None,
        HAS_INITIAL_STATE=has_initial_state is not None,
        PRECISION=chain_precision(gpu),
        **chain_tile._asdict(),
        **sizes,
    )
    return states
