"""When chunks are prepared beside the scan (chunk_prepare_beside.py), and what that begins with."""

import torch
from torch import Tensor

from .chunk_hopper import serves
from .chunk_prepare_beside import begin_kernel
from .chunk_prepared import Beside, chunk_places
from .chunk_segments import Split
from .configs import Gpu, cdiv
from .launch import launch

# Chunks of a sequence from which on it is faster, and multiprocessors that walk, at most, as a part
# of all. us of a prefill in which no head forgets, of 32 and of 16 value heads, where chunks are
# prepared before / beside, or 16 heads have maps of segments (H200, Triton 3.6, 2026-11-30):
#
#     tokens     4096         8192         32768
#     32 heads   113 / 100    210 / 183    806 / 697
#     16 heads    87 / 77     161 / 148    506 / 501
CHUNKS, PART = 64, 0.5


def pick_limit(sequences: int, chunks: int, HV: int, K: int, V: int, gpu: Gpu) -> int:
    """Multiprocessors for chunks beside the scan; 0 where they are prepared before it.

    Args:
        sequences: Sequences that are walked.
        chunks: Of all of them, of 16-bit tokens that come by descriptors.
        HV: Value heads.
        K: Key size.
        V: Value size.
        gpu: The GPU.
    """
    walks = 2 * sequences * HV
    is_worth = walks <= PART * gpu.multiprocessors and chunks >= CHUNKS * sequences
    return gpu.multiprocessors - walks if is_worth and serves(K, V, gpu) else 0


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
    done = torch.empty(3 + items, dtype=torch.int32, device=k.device)
    launch(
        begin_kernel,
        cdiv(3 + items, 1024),
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
