"""One thing to measure in a row, and the process that measures: checked first, then timed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.contender import Call, NotServed
from benchmarks.timing import graph_times

OUT_OF_TIME = "not measured: time limit"


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


def measured(entry: Entry) -> dict:
    """``us p10 p90`` and the errors of the check, or the ``reason`` why there are none."""
    try:
        errors = entry.check()
        with torch.no_grad():
            result = entry.time(entry.calls())
        return result | {"errors": {name: float(f"{e:.2g}") for name, e in errors.items()}}
    except Exception as error:
        return {"reason": reason(error)}
