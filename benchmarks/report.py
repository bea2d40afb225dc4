"""What the suite says of its numbers: a row of the JSON, a printed line, the table at the end."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from benchmarks import ours
from benchmarks.rows import LAYOUTS, ONE_STEP, OPERATORS, bytes_moved, parse

# In the rows of layouts this stands where ours does, and the other one among the peers.
V_MAJOR = "V-major"
HEADERS = ("row", "ours", "with gates", "floor", "target", "best peer", "times as fast")


def floor(row: str, result: dict, ceilings: dict[str, float]) -> float | None:
    """Microseconds of the row's least traffic at the bandwidth of the run's copy.

    A layer and a model count their own ``bytes`` and ``flops``; there it is the longer of that and
    of the operations at the rate of the run's product.
    """
    if "copy TB/s" not in ceilings:
        return None
    if parse(row).name in (*OPERATORS, *LAYOUTS):
        return round(bytes_moved(parse(row)) / ceilings["copy TB/s"] / 1e6, 2)
    if "bytes" not in result:
        return None
    times = result["bytes"] / ceilings["copy TB/s"], result["flops"] / ceilings["mm TFLOP/s"]
    return round(max(times) / 1e6, 2)


def row_result(
    row: str, found: dict[str, dict], ceilings: dict[str, float], targets: dict[str, dict]
) -> dict:
    """A row of the JSON: our numbers or the reason, the floor and target, each peer's the same."""
    first = V_MAJOR if parse(row).name in LAYOUTS else ours.NAME
    result = {"row": row} | found.get(first, {"reason": "not measured"})
    least = floor(row, result, ceilings)
    if least is not None:
        result["floor_us"] = least
    result |= targets.get(row, {})
    if ours.WITH_GATES in found:
        result["with_gates"] = found[ours.WITH_GATES]
    if ours.EAGER in found:
        result["eager"] = found[ours.EAGER]
    others = {k: v for k, v in found.items() if k not in (first, ours.WITH_GATES, ours.EAGER)}
    return result | {"peers": others}


def compared(result: dict) -> float | None:
    """Our time of the same work as the peers': with the gates where they have them inside."""
    if parse(result["row"]).name in ONE_STEP:
        return result.get("with_gates", {}).get("us")
    return result.get("us")


def best_peer(result: dict) -> tuple[str, float] | None:
    """The fastest peer and its microseconds."""
    times = {name: peer["us"] for name, peer in result.get("peers", {}).items() if "us" in peer}
    return min(times.items(), key=lambda item: item[1]) if times else None


def number(x: float | None) -> str:
    """Four figures are more than a run repeats."""
    if x is None:
        return ""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def cells(result: dict) -> list[str]:
    """The row of the short table."""
    gates = result.get("with_gates", {})
    peer, ours_us = best_peer(result), compared(result)
    return [
        result["row"],
        number(result["us"]) if "us" in result else result["reason"],
        number(gates["us"]) if "us" in gates else gates.get("reason", ""),
        number(result.get("floor_us")),
        number(result.get("target_us")),
        f"{peer[0]} {number(peer[1])}" if peer else "",
        f"{peer[1] / ours_us:.2f}" if peer and ours_us else "",
    ]


def line(result: dict) -> str:
    """A row as soon as it is measured, with every peer or its reason."""
    row, us, gates, least, target, _, ratio = cells(result)
    text = f"{row}: {us}"
    for label, value in (("with gates", gates), ("floor", least), ("target", target)):
        text += f", {label} {value}" if value else ""
    others = {"eager": result["eager"]} if "eager" in result else {}
    for name, peer in (others | result["peers"]).items():
        text += f"; {name} {number(peer['us']) if 'us' in peer else peer['reason']}"
    return text + (f"; {ratio} times as fast as the best" if ratio else "")


def plain_table(rows: list[list[str]]) -> str:
    """Columns as wide as they must be; there may be no rich on a machine that only measures."""
    widths = [min(40, max(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = ["  ".join(c[:w].ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(text.rstrip() for text in lines)


def show(machine: dict, ceilings: dict[str, float], results: list[dict]) -> None:
    """The short table, microseconds."""
    print(f"\nMicroseconds, medians. {machine}")
    print(", ".join(f"{name} {value:.2f}" for name, value in ceilings.items()))
    print(plain_table([list(HEADERS), *(cells(result) for result in results)]), flush=True)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on the error output where that is a terminal and rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    except ImportError:
        yield lambda: None
        return
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("rows", total=total)
        yield lambda: bar.advance(task)
