"""All figures: of the kernels of every call, and of the operators of every row."""

from collections.abc import Iterator
from typing import Any

from benchmarks.rows import ROWS, Row, bytes_moved
from benchmarks.static import model, traffic
from benchmarks.static.calls import CALLS, call_of_row
from benchmarks.static.figures import figures
from benchmarks.static.launches import Launch, record, record_all

# Rows of operators alone; others have kernels of Inductor's before them.
OPERATORS = ("decode", "verify", "verify_once", "prefill", "train")
OPERATOR_ROWS = tuple(row for row in ROWS if row.name in OPERATORS)


def kernels(arch: str) -> dict[str, Launch]:
    """The launches of every call by name, each kernel with its flags and tiles once."""
    named: dict[str, Launch] = {}
    for call, function in CALLS.items():
        for launch in record(function, arch):
            named[f"{call}: {launch.kernel}"] = launch
    distinct: dict[str, str] = {}
    for name, launch in named.items():
        key = repr((launch.kernel, launch.signature(), launch.num_warps, launch.num_stages))
        distinct.setdefault(key, name)
    return {name: named[name] for name in distinct.values()}


def kernel_figures(launch: Launch, arch: str) -> dict[str, Any]:
    """What is accepted of a kernel."""
    return figures(launch.compile(arch))


def traffic_of(row: Row, arch: str) -> dict[str, Any]:
    """Launches and bytes of an operator, which need no compiled kernel."""
    launches = record_all(call_of_row(row), arch)
    tokens = row.N * row.T
    return {
        "launches": len(launches),
        "bytes a token": round(sum(map(traffic.bytes_moved, launches)) / tokens),
        "least bytes a token": round(bytes_moved(row) / tokens),
    }


def predictions(row: Row) -> list[model.Prediction]:
    """The launches of a row by the model, in order."""
    return [model.predict(launch) for launch in record_all(call_of_row(row), model.ARCH)]


def operator_figures(row: Row) -> dict[str, Any]:
    """What is accepted of a row."""
    seconds = model.duration(record_all(call_of_row(row), model.ARCH))
    return traffic_of(row, model.ARCH) | {"predicted us": round(seconds * 1e6, 1)}


def collect(only: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Section, name and figures of all whose name contains ``only``, one by one."""
    for name, launch in kernels(model.ARCH).items():
        if only in name:
            yield "kernels", name, kernel_figures(launch, model.ARCH)
    for row in OPERATOR_ROWS:
        if only in str(row):
            yield "operators", str(row), operator_figures(row)
