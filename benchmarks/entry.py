"""One thing to measure in a row, and the process that measures: checked first, then timed."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.contender import Call, NotServed
from benchmarks.timing import graph_times, summary

OUT_OF_TIME = "not measured: time limit"
# Of calls from Python: the clock of a virtual processor changes by half within a second.
ROUNDS = 8


class Wrong(Exception):
    """A result is further from float64 than its numbers' rounding allows: it is not timed."""


@dataclass(frozen=True)
class Entry:
    """A contender in a row.

    ``check`` returns errors on a small call or raises ``Wrong``; ``calls`` makes the calls to time,
    each on memory of its own, together more than the cache holds; ``time`` times them.
    """

    name: str
    check: Callable[[], dict[str, float]]
    calls: Callable[[], list[Call]]
    time: Callable[[list[Call]], dict] = graph_times


@dataclass(frozen=True)
class Side:
    """A contender in a row of calls from Python, which take turns once all are checked.

    ``sample`` times a few of them, whole and on the GPU alone; ``about`` says what else the row's
    JSON has.
    """

    name: str
    check: Callable[[], dict[str, float]]
    sample: Callable[[], tuple[list[float], list[float]]]
    about: Callable[[], dict]


def refuse(errors: dict[str, float], bounds: Callable[[str], float]) -> None:
    """Raise ``Wrong`` where an error passes its bound, or is no number."""
    for name, error in errors.items():
        if not error <= bounds(name):
            raise Wrong(f"wrong: {name} is off by {error:.2g}, more than {bounds(name):.2g}")


def reason(error: BaseException) -> str:
    """The first line of an exception, with its type where the line does not say enough."""
    text = " ".join(str(error).strip().splitlines()[:1])[:160]
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"not installed: {text}"
    if isinstance(error, NotServed | Wrong):
        return text
    return f"{type(error).__name__}: {text}"


def checked(x: Entry | Side) -> dict:
    """The errors of the check, or the ``reason`` why there are none."""
    try:
        return {"errors": {name: float(f"{e:.2g}") for name, e in x.check().items()}}
    except Exception as error:
        return {"reason": reason(error)}


def measured(entry: Entry) -> dict:
    """``us p10 p90`` and the errors of the check, or the ``reason`` why there are none."""
    found = checked(entry)
    if "reason" in found:
        return found
    try:
        with torch.no_grad():
            return entry.time(entry.calls()) | found
    except Exception as error:
        return {"reason": reason(error)}


@torch.no_grad()
def measured_in_turn(sides: list[Side]) -> dict[str, dict]:
    """``us p10 p90 gpu_us`` of sides that were checked, or the ``reason`` why there are none."""
    walls: dict[str, list[float]] = {side.name: [] for side in sides}
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    found: dict[str, dict] = {}
    for i in range(ROUNDS):
        for side in sides if i % 2 else reversed(sides):
            if side.name in found:
                continue
            try:
                wall, gpu = side.sample()
            except Exception as error:
                found[side.name] = {"reason": reason(error)}
                continue
            walls[side.name] += wall
            times[side.name] += gpu
    for side in sides:
        if side.name not in found:
            gpu_us = round(statistics.median(times[side.name]), 2)
            found[side.name] = summary(walls[side.name]) | {"gpu_us": gpu_us} | side.about()
    return found
