"""Slots of a pool, read on the host: which rows are live, what each reads and writes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._library import debug
from ._sequences import Bounds


@dataclass(frozen=True)
class Slots:
    """Slots of each sequence; only those of the sequences in ``live`` mean anything."""

    live: list[int]  # sequences that are neither padding nor empty
    read: list[int]
    write: list[list[int]]  # one slot, or one for each token with a table


def resolve_slots(
    op: str,
    bounds: Bounds,
    slots: int,
    state_indices: Tensor | None,
    read_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_index: int = -1,
) -> Slots:
    """Apply the rules of padding and of accepted counts (``docs/semantics.md``) to one call.

    Raises:
        ValueError: a live row names a slot outside the pool; under ``GDN_DEBUG=1``, one writes a
            slot that another reads or writes.
    """
    N = bounds.count
    table = _table(state_indices, N)
    accepted = [1] * N if num_accepted_tokens is None else num_accepted_tokens.tolist()
    reads = None if read_indices is None else read_indices.tolist()
    per_token = state_indices is not None and state_indices.dim() == 2
    live, read, write = [], [0] * N, [[0]] * N
    for n, row in enumerate(table):
        L = bounds.lengths[n]
        if L == 0 or not 1 <= accepted[n] <= len(row) or (per_token and len(row) < L):
            continue
        read[n] = row[accepted[n] - 1] if reads is None else reads[n]
        write[n] = row[:L] if per_token else row
        if read[n] <= null_index or (not per_token and row[0] <= null_index):
            continue
        live.append(n)
    _check_inside(op, "state_indices" if reads is None else "read_indices", read, live, slots)
    for n in live:
        _check_inside(op, "state_indices", write[n], range(len(write[n])), slots, row=n)
    if debug():
        _check_distinct(op, live, read, write, null_index)
    return Slots(live, read, write)


def _table(state_indices: Tensor | None, N: int) -> list[list[int]]:
    if state_indices is None:
        return [[n] for n in range(N)]
    rows = state_indices if state_indices.dim() == 2 else state_indices[:, None]
    return rows.tolist()


def _check_inside(
    op: str,
    name: str,
    values: Sequence[int],
    which: Sequence[int],
    slots: int,
    row: int | None = None,
) -> None:
    for i in which:
        if values[i] >= slots:
            at = f"row {i}" if row is None else f"row {row}"
            raise ValueError(
                f"{op}: {name} must be less than the pool's {slots} slots, got {values[i]} in {at}"
            )


def _check_distinct(
    op: str, live: list[int], read: list[int], write: list[list[int]], null_index: int
) -> None:
    owner: dict[int, int] = {}
    for n in live:
        for slot in set(write[n]):
            if slot > null_index and owner.setdefault(slot, n) != n:
                raise ValueError(
                    f"{op}: state_indices must name a slot in one live row only, "
                    f"got slot {slot} in rows {owner[slot]} and {n}"
                )
    for n in live:
        if owner.get(read[n], n) != n:
            raise ValueError(
                f"{op}: state_indices must not name a slot that another live row reads, "
                f"got slot {read[n]}, read by row {n} and written by row {owner[read[n]]}"
            )


def check_bounds(op: str, cu_seqlens: Tensor | None, T: int) -> None:
    """Under ``GDN_DEBUG=1``, check what only the data of ``cu_seqlens`` can tell.

    Raises:
        ValueError: it does not start at 0, decreases, or passes ``T``.
    """
    if cu_seqlens is None or not debug():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must start at 0, got {bounds[0]}")
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ValueError(
                f"{op}: cu_seqlens must not decrease, got {start} then {end} in row {n}"
            )
    if bounds[-1] > T:
        raise ValueError(f"{op}: cu_seqlens must end at most at T = {T}, got {bounds[-1]}")


def fresh_rows(has_initial_state: Tensor | None, ids: Sequence[int], like: Tensor) -> Tensor | None:
    """Mask ``[n, 1, 1, 1]`` of the sequences ``ids`` that start from zero, if there are any."""
    if has_initial_state is None:
        return None
    has = has_initial_state.tolist()
    fresh = [not has[n] for n in ids]
    return torch.tensor(fresh, device=like.device)[:, None, None, None] if any(fresh) else None
