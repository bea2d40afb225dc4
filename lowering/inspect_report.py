"""The report of ``lowering.inspect`` as text, with tables where rich and a terminal are there."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .arch import Arch

if TYPE_CHECKING:
    from .inspect import GraphReport, KernelReport

COLUMNS = (
    *("kernel", "kind", "launches", "fused", "operands"),
    *("registers", "spills", "shared", "blocks/SM", "warps"),
)


def print_report(graphs: Sequence["GraphReport"], arch: Arch, with_code: bool) -> None:
    rich = _rich() if sys.stdout.isatty() else None
    compute = "compute unit" if arch.is_amd else "multiprocessor"
    print(f"{arch.name} ({arch.device}), {len(graphs)} graph{'s' * (len(graphs) != 1)}")
    for number, graph in enumerate(graphs):
        title = f"graph {number}, {graph.phase}: {_plural(len(graph.kernels), 'kernel')}"
        print()
        rows = [_row(kernel) for kernel in graph.kernels]
        if rich is None:
            print(title)
            _print_plain(rows)
        else:
            _print_rich(rich, title, rows)
        for kernel in graph.kernels:
            if kernel.error is not None:
                print(f"  {kernel.name} does not compile: {kernel.error}")
        for name, count in graph.calls.items():
            print(f"  call {name}" + (f", {count} times" if count > 1 else ""))
        for reason in graph.cudagraph_skips:
            print(f"  {reason}")
        if with_code:
            print(f"\n{graph.code}")
    print(
        "\noperands: bytes of a launch's tensors, at least moved unless it picks rows;"
        f" spills: accesses to local memory in the code; blocks/SM: that fit a {compute}"
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _row(kernel: "KernelReport") -> tuple[str, ...]:
    return (
        kernel.name,
        " ".join(filter(None, (kernel.kind, kernel.template))),
        str(kernel.launches),
        ", ".join(kernel.fused),
        _size(kernel.bytes),
        _number(kernel.registers),
        _number(kernel.spills),
        "-" if kernel.shared is None else _size(kernel.shared),
        _number(kernel.occupancy),
        str(kernel.num_warps),
    )


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _print_plain(rows: Sequence[Sequence[str]]) -> None:
    """A kernel takes some lines, since what is fused is longer than a line."""
    for row in rows:
        values = dict(zip(COLUMNS, row, strict=True))
        print(f"  {values.pop('kernel')} ({values.pop('kind')})")
        print(f"    fused: {values.pop('fused')}")
        print("    " + ", ".join(f"{name}: {value}" for name, value in values.items()))


def _rich() -> Any:
    try:
        import rich.console
        import rich.table
    except ImportError:
        return None
    return rich


def _print_rich(rich: Any, title: str, rows: Sequence[Sequence[str]]) -> None:
    table = rich.table.Table(title=title, title_justify="left")
    for name in COLUMNS:
        is_text = name in ("kernel", "kind", "fused")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    rich.console.Console().print(table)
