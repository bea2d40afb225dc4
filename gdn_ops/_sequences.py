"""Sequences, as the plain PyTorch implementations see them: blocks of equal length.

A batch ``[B, T]`` and a packed row ``[1, T]`` with ``cu_seqlens`` are both a list of sequences with
a start and a length. Sequences of one length are computed together, as many as keep their states in
the processor's cache: a state is then read from memory once and written once.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# States computed together on a CPU. In place, decode at (B, HV, V, K) = (16, 32, 128, 128) moves
# each state through memory once at 2 MiB; at 1, 4, 8 and 32 MiB it takes 1.03, 1.12, 1.23 and 1.43
# times as long (AMD EPYC, one thread, torch 2.13, 2026-11-24).
_BLOCK_BYTES = 2 << 20

Index = slice | Tensor


def as_index(numbers: Sequence[int], device: torch.device) -> Index:
    """Row numbers as a slice (a view) where they are consecutive, else as an index tensor."""
    first = numbers[0]
    if all(number == first + i for i, number in enumerate(numbers)):
        return slice(first, first + len(numbers))
    return torch.tensor(numbers, device=device)


@dataclass(frozen=True)
class Bounds:
    """Start and length of each sequence, on the host."""

    starts: list[int]
    lengths: list[int]
    packed: bool

    @staticmethod
    def of(x: Tensor, cu_seqlens: Tensor | None) -> "Bounds":
        """Bounds of the sequences in ``x [B, T, ...]``; a bound past ``T`` counts as ``T``."""
        B, T = x.shape[:2]
        if cu_seqlens is None:
            return Bounds([0] * B, [T] * B, packed=False)
        bounds = [min(max(bound, 0), T) for bound in cu_seqlens.tolist()]
        lengths = [max(0, end - start) for start, end in itertools.pairwise(bounds)]
        return Bounds(bounds[:-1], lengths, packed=True)

    @property
    def count(self) -> int:
        return len(self.lengths)

    def blocks(self, x: Tensor, bytes_each: int, live: Sequence[int]) -> Iterator["Block"]:
        """The sequences ``live`` that are not empty, in order, in blocks of equal length.

        Args:
            x: Any of the tensors ``[B, T, ...]``; only its device is used.
            bytes_each: Size of the state of one sequence.
            live: Numbers of the sequences to compute.
        """
        limit = max(1, _BLOCK_BYTES // bytes_each) if x.device.type == "cpu" else self.count
        ids: list[int] = []
        for n in live:
            if self.lengths[n] == 0:
                continue
            if ids and (self.lengths[ids[0]] != self.lengths[n] or len(ids) == limit):
                yield self._block(ids, x.device)
                ids = []
            ids.append(n)
        if ids:
            yield self._block(ids, x.device)

    def _block(self, ids: list[int], device: torch.device) -> "Block":
        starts = [self.starts[n] for n in ids]
        length = self.lengths[ids[0]]
        rows = as_index([0] if self.packed else ids, device)
        if isinstance(rows, slice) and (len(ids) == 1 or not self.packed):
            everything = not self.packed and len(ids) == self.count
            return Block(ids, length, rows, starts[0], None, everything)
        batch = torch.tensor([0] * len(ids) if self.packed else ids, device=device)[:, None]
        return Block(ids, length, batch, 0, torch.tensor(starts, device=device)[:, None])


@dataclass(frozen=True)
class Block:
    """Sequences ``ids`` of one ``length`` that are computed together."""

    ids: list[int]
    length: int
    _rows: Index  # a slice of the batch, or the batch row of each sequence [n, 1]
    _start: int
    _starts: Tensor | None  # [n, 1] where the sequences are scattered
    _everything: bool = False  # all tokens of the call: then nothing need be indexed

    @property
    def adjacent(self) -> bool:
        """Whether ``read`` returns a view."""
        return self._starts is None and isinstance(self._rows, slice)

    def _at(self, x: Tensor, t0: int, t1: int) -> tuple[Index, Index]:
        if self._starts is None:
            return self._rows, slice(self._start + t0, self._start + t1)
        return self._rows, self._starts + torch.arange(t0, t1, device=x.device)

    def read(self, x: Tensor, t0: int, t1: int) -> Tensor:
        """Tokens ``t0 .. t1 - 1`` of each sequence of ``x [B, T, ...]``: ``[n, t1 - t0, ...]``."""
        if self._everything and t1 - t0 == self.length:
            return x
        return x[self._at(x, t0, t1)]

    def write(self, x: Tensor, t0: int, t1: int, value: Tensor) -> None:
        """Store ``value [n, t1 - t0, ...]`` as tokens ``t0 .. t1 - 1`` of ``x [B, T, ...]``."""
        if self._everything and t1 - t0 == self.length:
            x.copy_(value)
        else:
            x[self._at(x, t0, t1)] = value.to(x.dtype)


def new_output(like: Tensor, bounds: Bounds, live: Sequence[int]) -> Tensor:
    """An output ``[B, T, ...]`` to be written sequence by sequence: zero where none will write."""
    written = sum(bounds.lengths[n] for n in live)
    if written == like.shape[0] * like.shape[1]:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.zeros_like(like, memory_format=torch.contiguous_format)


def load_states(states: Tensor, numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Rows of a pool, contiguous, in ``dtype``; the pool's own memory where it already is so."""
    return states[as_index(numbers, states.device)].to(dtype).contiguous()


def store_states(states: Tensor, numbers: Sequence[int], value: Tensor) -> None:
    """Round ``value`` to the pool's dtype and store it in rows ``numbers``."""
    index = as_index(numbers, states.device)
    if isinstance(index, slice) and states[index].data_ptr() == value.data_ptr():
        return  # computed in the pool's own memory
    states[index] = value.to(states.dtype)
