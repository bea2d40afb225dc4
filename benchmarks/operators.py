"""The rows of single operators: contenders, their checks on a small call, their calls."""

import dataclasses
import functools

import torch

from benchmarks import exact, ours
from benchmarks.cases import Case, make_case
from benchmarks.contender import Call
from benchmarks.entry import Entry, refuse
from benchmarks.peers import find
from benchmarks.rows import ONE_STEP, Heads, Row
from benchmarks.timing import copies


def small(row: Row) -> Row:
    """A call of the same kind that float64 can follow token by token; odd lengths.

    With few heads it is long enough to be split into segments, as the row is.
    """
    most = 3501 if row.ranks > 1 else 100 if row.name == "train" else 200
    T = row.T if row.name in ONE_STEP else min(row.T, most)
    return dataclasses.replace(row, N=min(row.N, 3), T=T)


def has_gates(name: str, row: Row) -> bool:
    """Whether a contender starts from raw gates: in a step, all but our bare operator do."""
    return row.name == "prefill_serving" or (row.name in ONE_STEP and name != ours.NAME)


def make_call(name: str, row: Row, case: Case) -> Call:
    """The call of a contender by its name."""
    if name == ours.NAME:
        return ours.make_call(row, case)
    if name == ours.WITH_GATES:
        return ours.make_call_with_gates(row, case)
    return find(name).make_call(row, case)


@functools.cache
def check(name: str, row: Row, heads: Heads, device: str) -> dict[str, float]:
    """Relative errors of one small call.

    Raises:
        Wrong: one is more than bfloat16 allows.
    """
    torch.manual_seed(0)
    case = make_case(row, heads, device)
    expected = exact.answer(row, case, has_gates(name, row))
    with torch.no_grad():
        call = make_call(name, row, case)
        errors = exact.errors(exact.results(row, case, call), expected)
    refuse(errors, exact.bound)
    return errors


def entries(
    row: Row, peers: tuple[str, ...], heads: Heads | None = None, device: str = "cuda"
) -> list[Entry]:
    """Ours first, then each peer, all on the same inputs."""
    heads = heads or row.heads
    cases: list[Case] = []

    def calls(name: str) -> list[Call]:
        if not cases:
            torch.manual_seed(0)
            cases.extend(make_case(row, heads, device) for _ in range(copies(row)))
        return [make_call(name, row, case) for case in cases]

    names = [ours.NAME, *([ours.WITH_GATES] if row.name in ONE_STEP else []), *peers]
    return [
        Entry(
            name if name in (ours.NAME, ours.WITH_GATES) else find(name).NAME,
            functools.partial(check, name, small(row), heads, device),
            functools.partial(calls, name),
        )
        for name in names
    ]
