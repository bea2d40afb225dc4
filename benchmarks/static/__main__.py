"""Figures of the compiled kernels and a model's times for the H200, on a machine without a GPU."""

import argparse
import sys

import triton  # noqa: TID253
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.rows import bytes_moved, parse
from benchmarks.static.accepted import SECTIONS, Figures, compare, load, save
from benchmarks.static.collect import collect, predictions
from benchmarks.static.measured import measured
from benchmarks.static.model import ARCH, BANDWIDTH

# To a file or a pipe as wide as the tables are.
CONSOLE = Console() if sys.stdout.isatty() else Console(width=170)


def main() -> int:
    """Prints, checks or accepts; 1 where a check fails."""
    parser = argparse.ArgumentParser("python -m benchmarks.static", description=__doc__)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="fail where a figure is not accepted")
    group.add_argument("--accept", action="store_true", help="accept all figures as they are")
    parser.add_argument("--only", default="", help="only what has this text in its name")
    args = parser.parse_args()
    if args.check:
        try:
            load(ARCH, triton.__version__)
        except FileNotFoundError as error:
            print(f"{error}; --accept would accept them", file=sys.stderr)
            return 1
    found: dict[str, Figures] = {section: {} for section in SECTIONS}
    progress = Console(stderr=True)
    for section, name, figures in track(
        collect(args.only), "Compiling", total=None, console=progress, transient=True
    ):
        found[section][name] = figures
    if args.check:
        return check(found, args.only)
    if args.accept:
        accept(found, args.only)
    else:
        show(found)
    return 0


def check(found: dict[str, Figures], only: str) -> int:
    """Print what is not as accepted; 1 where that is more than better."""
    accepted = load(ARCH, triton.__version__)
    findings = [
        finding
        for section in SECTIONS
        for finding in compare(
            {name: x for name, x in accepted[section].items() if only in name}, found[section]
        )
    ]
    for finding in findings:
        print(finding)
    refused = sum(finding.is_refused for finding in findings)
    number = sum(map(len, found.values()))
    print(f"Triton {triton.__version__}: {number} checked, {refused} of {len(findings)} refused")
    if findings:
        print("Where this is meant: python -m benchmarks.static --accept")
    return int(refused > 0)


def accept(found: dict[str, Figures], only: str) -> None:
    """Write the figures; with ``only`` the others stay."""
    if only:
        accepted = load(ARCH, triton.__version__)
        found = {
            section: {name: x for name, x in accepted[section].items() if only not in name}
            | found[section]
            for section in SECTIONS
        }
    print(f"accepted: {save(ARCH, triton.__version__, found)}")


def show(found: dict[str, Figures]) -> None:
    """Two tables: the kernels, and the operators with times."""
    kernels = Table(title=f"Kernels for {ARCH}, Triton {triton.__version__}")
    for column in ("kernel", "warps", "regs", "spills", "in loops", "shared", "programs", "limit"):
        kernels.add_column(column, justify="left" if column in ("kernel", "limit") else "right")
    kernels.add_column("its main part")
    for name, x in found["kernels"].items():
        numbers = ("warps", "registers", "spills", "spills in loops", "shared memory")
        programs = str(x["programs per multiprocessor"])
        opcodes = ", ".join(f"{op} {n}" for op, n in x["opcodes"].items())
        part = f"{x['main part']}, {x['instructions']} instructions: {opcodes}"
        kernels.add_row(name, *(str(x[key]) for key in numbers), programs, x["limited by"], part)
    CONSOLE.print(kernels)
    CONSOLE.print(operators_table(found["operators"]))


def operators_table(operators: Figures) -> Table:
    """Floor, the model and what was measured, in microseconds on an H200."""
    table = Table(title="Operators on an H200, us")
    table.add_column("tokens x sequences, state")
    traffic = ("launches", "bytes a token", "least")
    for column in (*traffic, "floor", "model", "measured", "model / measured"):
        table.add_column(column, justify="right")
    table.add_column("by launch")
    times = measured()
    for name, x in operators.items():
        row, us = parse(name), x["predicted us"]
        measurement = times.get(name)
        launches = [
            f"{prediction.name} {prediction.seconds * 1e6:.1f} ({prediction.bound})"
            for prediction in predictions(row)
        ]
        table.add_row(
            name,
            *(str(x[key]) for key in ("launches", "bytes a token", "least bytes a token")),
            f"{bytes_moved(row) / BANDWIDTH * 1e6:.1f}",
            f"{us:.1f}",
            f"{measurement:.1f}" if measurement else "",
            f"{us / measurement:.2f}" if measurement else "",
            ", ".join(launches),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
