"""Splitting long sequences into segments that are walked side by side: when, and the launches.

The scan of one sequence has few programs, one after another chunk. Split, each segment needs the
state that enters it. Where all heads forget what was long before (chunk_forget.py), it is made of
the few chunks before the segment, and the scan begins with them. Where they do not, each segment
but the last is walked twice: ``carry_kernel`` (chunk_carry.py) finds what it does to the state that
enters it, and ``chain_kernel`` (chunk_chain.py) which state that is. With two segments, or with
four short ones, that is no faster than a sequence that is walked whole while its chunks are
prepared (chunk_beside.py), so those are split only if all forget; what they do is known to the
kernels alone, which find out first.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunk_carry import carry_kernel
from .chunk_chain import chain_kernel
from .chunk_forget import kept_kernel
from .chunk_hopper import serves
from .chunk_prepared import chunk_places
from .configs import Gpu, cdiv, next_power_of_2
from .launch import launch, strides

# us on an H200 (Triton 3.6, 2026-12-01), K = V = 128 and bfloat16: a chunk in the scan, and in the
# one in Gluon; of both its 0.25 more where all multiprocessors walk and one in the carry, where two
# programs share a multiprocessor and where one has it, and in the carry in Gluon; a segment in the
# chain; what the launches take beside that; and what it takes to look at what is forgotten.
SCAN, SCAN_HOPPER, CARRY, CARRY_ALONE, CARRY_HOPPER = 1.27, 0.97, 1.65, 1.25, 1.15
CHAIN, START = 2.55, 12.0
LOOKING = 15.0
# A chunk of a head where it is prepared before the scan, and the first ones beside it.
PREPARE, PREPARE_FIRST = 0.0215, 14.0
# What segments without maps must save, since to look costs a sequence that is walked whole some 8
# us, and those that save less are no faster than it is.
LEAST_SAVED = 90.0
# Chunks of a segment, at least. Of 128 chunks those of 8, 12 and 16 take the same time.
LEAST = 12
# Bounds that are read at once, and segments that are looked at.
BN = 128
# log2 of what is left of a state that counts as nothing: float32 has 24 digits. Chunks in which a
# state must have become so. As checkpoints are initialised (``A_log`` of 1 to 16, steps of 0.001 to
# 0.1) all of 32 heads do in 64 % of layers; in half as many chunks in 18 %, to 2**-64 in 1 %.
FORGOTTEN, LOOK = -32.0, 64


class Split(NamedTuple):
    """Segments that the chunks of a call are split into, about, and the fewest chunks of one."""

    SEGMENTS: int
    LEAST: int
    has_maps: bool = True  # else sequences are walked whole, unless all segments forget

    def constants(self) -> dict[str, Any]:
        """What all kernels of segments are told."""
        return {
            "SEGMENTS": self.SEGMENTS,
            "LEAST": self.LEAST,
            "FORGOTTEN": FORGOTTEN,
            "LOOK": LOOK,
            "BN": BN,
        }

    def places(self, T: int, B: int, BT: int, packed: int | None) -> int:
        """Places of segments of a row of the batch, or of so many ``packed`` sequences."""
        chunks = max(cdiv(cdiv(T, BT) * B, self.SEGMENTS), self.LEAST)
        return cdiv(T, BT * chunks) + (packed or 0)


# No split: what the scan is told of a call whose sequences are whole.
WHOLE = Split(1, 0, has_maps=False)


def choose(
    N: int,
    chunks: int,
    HV: int,
    V: int,
    BK: int,
    BV: int,
    dtype: torch.dtype,
    gpu: Gpu,
    *,
    needs_maps: bool,
    is_beside: bool = False,
    is_template: bool = False,
) -> Split:
    """How to split the sequences of a call, by what it takes.

    As many segments as there are multiprocessors for, where that is faster also if nothing is
    forgotten, or hardly slower. us (H200, Triton 3.6, 2026-12-01), of 8 value heads whole, with
    maps, and where all heads forget within 14 chunks; of others with maps, whole with chunks that
    are prepared beside, and where all forget:

        value heads              8              16              32
        4096 tokens     75  83  61     104  77  77     121 100 100
        8192           136 114  79     154 148 111     221 183 183
        32768          498 286 200     475 505 349     913 697 665

    Args:
        N: Sequences.
        chunks: Of all sequences.
        HV: Value heads.
        V: Value size.
        BK: Key size, padded.
        BV: Rows of a program of the scan.
        dtype: Of the tokens; float32 is not split, which nobody measured.
        gpu: The GPU.
        needs_maps: Whether sequences are packed or states updated in place, where others have
            been written when a segment reads the first.
        is_beside: Whether chunks of sequences that are walked whole are prepared beside the scan.
        is_template: Whether the kernels are templates, which have the plain scan and look at
            nothing that is forgotten; ``needs_maps`` goes with it.
    """
    programs = HV * cdiv(V, BV)
    segments, length = gpu.multiprocessors // programs, chunks // N
    # The carry of 256 keys would need more shared memory than there is.
    if BK > 128 or dtype == torch.float32:
        return WHOLE
    each = max(min(segments // N, length // LEAST), 1)
    is_hopper = serves(BK, V, gpu) and not is_template
    is_alone = 2 * programs * N * (each - 1) <= gpu.multiprocessors
    carry = CARRY_HOPPER if is_hopper else CARRY_ALONE if is_alone else CARRY
    walked = length / each
    rounds = cdiv(N * HV * cdiv(V, chain_tiles(gpu).BV), gpu.multiprocessors)
    cost = walked * carry + CHAIN * each * rounds + START
    cost += 0.0 if is_template else LOOKING
    cost += PREPARE * chunks * HV - PREPARE_FIRST if is_beside else 0.0
    saved = (SCAN_HOPPER if is_hopper else SCAN) * (length - walked)
    if saved > cost:
        return Split(segments, LEAST)
    if is_beside and not needs_maps and saved > LEAST_SAVED:
        return Split(segments, LEAST, has_maps=False)
    return WHOLE


class Tiles(NamedTuple):
    """Rows of a program, its warps and the stages of its loop."""

    BV: int
    num_warps: int
    num_stages: int


class Carry(NamedTuple):
    """A kernel, its tiles, and further options of Triton."""

    kernel: Any
    tiles: Tiles
    options: dict[str, Any]


def pick_carry(tiles: Any, K: int, V: int, use_descriptors: bool, gpu: Gpu) -> Carry:
    """The kernel that finds what segments do to states.

    Args:
        tiles: Those of ``scan_kernel``.
        K: Key size.
        V: Value size.
        use_descriptors: Whether 16-bit tokens come by descriptors.
        gpu: The GPU.
    """
    if not (use_descriptors and tiles.BT == 64 and serves(K, V, gpu)):
        return Carry(carry_kernel, carry_tiles(tiles.BV, gpu), {})
    # Not at the top: a Triton without Gluon has the other kernel.
    from .chunk_carry_hopper import carry_hopper_kernel

    return Carry(carry_hopper_kernel, Tiles(128, 4, 3), {"launch_pdl": True})


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


def bound_kept(
    k: Tensor,
    HV: int,
    g: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor | None,
    use_qk_l2norm: bool,
    BT: int,
    split: Split,
    at_starts: bool = False,
) -> Tensor:
    """``kept`` of chunk_forget.py, with ``at_starts`` also of chunks that begin segments."""
    B, T, H, K = k.shape
    N = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    places = chunk_places(B, T, BT, cu_seqlens)
    kept = torch.empty((places, HV), dtype=torch.float32, device=k.device)
    launch(
        kept_kernel,
        B * split.places(T, B, BT, N) * LOOK * (1 + at_starts) * H,
        (k, g, beta, cu_seqlens, kept),
        (*k.stride(), *strides(g, 3), *strides(beta, 3), *strides(cu_seqlens, 1), T, B),
        num_warps=4,
        num_stages=1,
        H=H,
        HV=HV,
        K=K,
        HAS_G=g is not None,
        HAS_BETA=beta is not None,
        IS_VARLEN=cu_seqlens is not None,
        USE_QK_L2NORM=use_qk_l2norm,
        AT_STARTS=at_starts,
        SEGMENTS=split.SEGMENTS,
        LEAST=split.LEAST,
        LOOK=LOOK,
        BT=BT,
        BK=next_power_of_2(K),
        BH=next_power_of_2(HV // H),
        BN=BN,
    )
    return kept


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
    kernel, carry_tile, options = pick_carry(tiles, K, V, constants["USE_DESCRIPTORS"], gpu)
    chain_tile = chain_tiles(gpu)
    sizes = {
        "BT": tiles.BT,
        "BK": tiles.BK,
        "HV": HV,
        "K": K,
        "V": V,
        "IS_VARLEN": cu_seqlens is not None,
        **split.constants(),
    }
    launch(
        kernel,
        B * places * HV * (cdiv(V, carry_tile.BV) + cdiv(K, carry_tile.BV)),
        (k, v, inverse, decays, kept, cu_seqlens, carry),
        (*k.stride(), *v.stride(), *strides(cu_seqlens, 1), *carry.stride(), T, B),
        H=H,
        HAS_KEPT=True,
        **carry_tile._asdict(),
        **options,
        **sizes,
        **constants,
    )
    launch(
        chain_kernel,
        N * HV * cdiv(V, chain_tile.BV),
        (
            carry,
            inverse,
            kept,
            state,
            state_indices,
            has_initial_state,
            cu_seqlens,
            read_indices,
            states,
        ),
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
        HAS_KEPT=cu_seqlens is None,
        **chain_tile._asdict(),
        **sizes,
    )
    return states
