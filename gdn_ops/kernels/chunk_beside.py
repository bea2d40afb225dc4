"""When chunks are prepared beside the scan (chunk_prepare_beside.py), and what that begins with."""

import torch
from torch import Tensor

from .chunk_hopper import serves
from .chunk_prepare_beside import ITEMS, begin_kernel
from .chunk_prepared import Beside, chunk_places
from .chunk_segments import Split
from .configs import Gpu, cdiv
from .launch import launch

# Chunks of all value heads from which on it is faster, and multiprocessors that walk, at most, as a
# part of all. us of a prefill in which no head forgets, where chunks are prepared before / beside,
# or 16 heads of 32768 tokens have maps of segments (H200, Triton 3.6, 2026-11-30):
#
#     tokens      1024         2048         3072         4096         8192         32768
#     32 heads    35.9 / 34.0  61.4 / 57.3  87.9 / 78.3   113 / 100    210 / 183    806 / 697
#     16 heads                 49.6 / 46.5  68.8 / 61.8    87 / 77     161 / 148    506 / 501
#     8 heads                  41.5 / 45.5               75.7 / 74.6
LEAST, PART = 512, 0.5


def pick_limit(sequences: int, chunks: int, HV: int, K: int, V: int, gpu: Gpu) -> int:
    """Multiprocessors for chunks beside the scan; 0 where they are prepared before it.

    The order in which they are prepared is that of one sequence: of two with 16 heads, 4096 tokens
    each, the second would wait for the first (117 us for 112, H200, Triton 3.6, 2026-11-30).

    Args:
        sequences: Sequences that are walked.
        chunks: Of all of them, of 16-bit tokens that come by descriptors.
        HV: Value heads.
        K: Key size.
        V: Value size.
        gpu: The GPU.
    """
    walks = 2 * HV
    is_room = sequences == 1 and walks <= PART * gpu.multiprocessors
    is_worth = is_room and chunks * HV >= LEAST and serves(K, V, gpu)
    return gpu.multiprocessors - walks if is_worth else 0


def begin(
    limit: int,
    kept: Tensor | None,
    k: Tensor,
    HV: int,
    cu_seqlens: Tensor | None,
    BT: int,
    split: Split,
) -> Beside:
    """What ``prepare`` needs of a call of which nothing is done."""
    B, T, H, _ = k.shape
    items = chunk_places(B, T, BT, cu_seqlens) * H
    done = torch.empty(ITEMS.value + items, dtype=torch.int32, device=k.device)
    launch(
        begin_kernel,
        cdiv(len(done), 1024),
        (kept, done),
        (T, B, items),
        num_warps=4,
        num_stages=1,
        HV=HV,
        HAS_KEPT=kept is not None,
        BT=BT,
        BW=1024,
        **split.constants(),
    )
    return Beside(done, limit)
