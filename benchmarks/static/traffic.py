"""Bytes that a launch moves to and from the memory of a GPU, counted from its tensors.

Each tensor counts once for a launch: what several programs read, the cache has. Of a pool count the
slots that are named. An intermediate is written by one launch and read by the next, and so counts
twice.
"""

import math

import torch

from benchmarks.static.launches import Launch, TorchLaunch

# Kernels that most often only look whether there is something to do, and what they read for that.
LOOKS_AT = {"chunk_beta": ("beta",)}


def bytes_of(x: torch.Tensor) -> int:
    """Bytes of a tensor; an expanded dimension has one element."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.itemsize


def bytes_moved(launch: Launch | TorchLaunch) -> int:
    """What a launch reads and writes."""
    if isinstance(launch, TorchLaunch):
        return sum(bytes_of(x) for x in launch.tensors)
    tensors = {name: x for name, x in launch.args.items() if isinstance(x, torch.Tensor)}
    read = LOOKS_AT.get(launch.kernel, tensors)
    moved = {name: bytes_of(tensors[name]) for name in read}
    slots = tensors.get("state_indices")
    if slots is not None:
        written = slots.numel() if slots.dim() == 2 else len(slots)
        slot = bytes_of(tensors["state"][:1])
        # A kernel has the pool as one argument or as two; it is read and written either way.
        moved |= {"state": len(slots) * slot, "final_state": written * slot}
    return sum(moved.values())
