"""Launching ``prepare_kernel`` (chunk_prepare.py), before a scan or beside it."""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .chunk_prepare import prepare_kernel
from .chunk_prepare_beside import prepare_beside_kernel
from .configs import PREPARE_WARPS, Gpu, cdiv
from .launch import launch, strides

# Bounds that ``prepare_kernel`` reads at once.
PREPARE_BN = 128


class PrepareChoice(NamedTuple):
    """How ``prepare_kernel`` is launched."""

    num_warps: int
    NORMS_BY_PRODUCT: bool
    KB: int
    STAGES: int
    HEADS: int


def prepare_choice(
    dtype: torch.dtype, gpu: Gpu, BK: int, H: int, HV: int, places: int
) -> PrepareChoice:
    """Warps, tiles and heads of a program of ``prepare_kernel``.

    Four warps have 16 rows each, so that all merges of the inverse but two stay inside a warp.
    Squares by warp groups save 400 of 2800 instructions and 34 spills; before warp groups, on
    sm_80, they would spill (cross-compiled, 2026-11-24).

    The heads of a key head in one program take 88 us for 8192 tokens of 16 heads, with the norms
    inside 94; one a program 104 and 116 (H200, 2026-11-25). But they wait for each other, so there
    is one where programs would be too few: of 512 tokens 8.5 us instead of 9.6.

    Args:
        dtype: Dtype of keys and queries.
        gpu: The GPU.
        BK: Key size, padded.
        H: Key heads.
        HV: Value heads.
        places: Chunks.
    """
    if dtype == torch.float32:
        return PrepareChoice(8, False, min(BK, 32), 1, 1)
    # Elsewhere a thread would spill, on sm_80 64 times in the loop over heads.
    has_room = not gpu.arch.startswith(("sm_8", "gfx"))
    heads = HV // H if has_room and not gpu.is_tight else 1
    while HV // H % heads or (heads > 1 and places * HV < heads * 2 * gpu.multiprocessors):
        heads -= 1
    KB = min(BK, 64)
    # A stage more than are read: all reads are then before the first product. Of four, three are.
    stages = min(BK // KB, 3) + 1
    num_warps = PREPARE_WARPS.get(gpu.arch, 4) if heads > 1 else 4
    return PrepareChoice(num_warps, has_room, KB, stages, heads)


class Beside(NamedTuple):
    """``done`` of chunk_prepare_beside.py, and the multiprocessors of programs that prepare."""

    done: Tensor
    limit: int


# What ``prepare_kernel`` is told where it is launched itself, and no other kernel begins with it.
ALONE: dict[str, Any] = {"STARTS_NEXT": False, "PROGRAM": None, "PROGRAMS": None}
# Programs of ``prepare_beside_kernel`` on a multiprocessor: of 255 registers a thread and 49 KiB.
BESIDE = 2
# Of float32 products: of the inverse, and with float32 inputs of all others.
PRECISION = "ieee"
DOT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def rows_of_decays(use_qk_l2norm: bool, is_scaled: bool) -> int:
    """Rows of ``G`` of ``prepare_kernel``."""
    return 3 if use_qk_l2norm else 1 + is_scaled


def chunk_places(B: int, T: int, BT: int, cu_seqlens: Tensor | None) -> int:
    """Places of chunks (chunk_prepare.py)."""
    chunks = cdiv(T, BT)
    return B * chunks if cu_seqlens is None else chunks + cu_seqlens.shape[0] - 1


def prepare(
    q: Tensor,
    k: Tensor,
    HV: int,
    g: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor | None,
    use_qk_l2norm: bool,
    BT: int,
    BK: int,
    gpu: Gpu,
    *,
    is_scaled: bool = True,
    starts_next: bool = False,
    beside: Beside | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``G``, ``inverse`` and with ``is_scaled`` ``weights`` of ``prepare_kernel``.

    ``beside`` the kernel that reads them, if that is asked for.
    """
    B, T, H, K = k.shape
    wide = torch.float64 if k.dtype == torch.float32 else torch.float32
    places = chunk_places(B, T, BT, cu_seqlens)
    rows = rows_of_decays(use_qk_l2norm, is_scaled)
    G = torch.empty((places, HV, rows, BT), dtype=wide, device=k.device)
    inverse = torch.empty((B, T, HV, BT), dtype=k.dtype, device=k.device)
    weights = torch.empty_like(inverse) if is_scaled else None
    choice = prepare_choice(k.dtype, gpu, BK, H, HV, places)
    if beside is not None:
        choice = choice._replace(HEADS=HV // H)
    items = places * (HV // choice.HEADS)
    kernel, programs = prepare_kernel, items
    done: tuple[Tensor, ...] = ()
    numbers: tuple[int, ...] = ()
    if beside is not None:
        kernel, programs = prepare_beside_kernel, BESIDE * gpu.multiprocessors
        done, numbers = (beside.done,), (items, beside.limit)
    launch(
        kernel,
        programs,
        (q, k, g, beta, cu_seqlens, G, weights, inverse, *done),
        (
            *q.stride(),
            *k.stride(),
            *strides(g, 3),
            *strides(beta, 3),
            *strides(cu_seqlens, 1),
            *inverse.stride(),
            T,
            *numbers,
        ),
        H=H,
        HV=HV,
        K=K,
        HAS_G=g is not None,
        HAS_BETA=beta is not None,
        IS_VARLEN=cu_seqlens is not None,
        USE_QK_L2NORM=use_qk_l2norm,
        IS_SCALED=is_scaled,
        DOT=DOT[k.dtype],
        PRECISION=PRECISION,
        BT=BT,
        BK=BK,
        BN=PREPARE_BN,
        KB=choice.KB,
        STAGES=choice.STAGES,
        HEADS=choice.HEADS,
        NORMS_BY_PRODUCT=choice.NORMS_BY_PRODUCT,
        **(ALONE | {"STARTS_NEXT": starts_next}),
        num_warps=choice.num_warps,
        num_stages=1,
    )
    return G, inverse, weights
