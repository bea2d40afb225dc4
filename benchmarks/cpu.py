"""The operators against Hugging Face's PyTorch functions on a CPU, both eager and compiled.

    python benchmarks/cpu.py [--repeats N] [--threads N] [--only NAME] [--keep-memory] [--json PATH]

All sides of a row are called in turn, in one process, on the same inputs, and so is what the
machine cannot do faster (``floor_cpu.py``); each row has a process of its own, and so has each
measurement of peak memory. Nothing is timed that a float64 loop over tokens does not confirm first
(``sides_cpu.py``).
What is compared, and how, is in benchmarks/README.md.
"""

import argparse
import datetime
import functools
import gc
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich.box
import torch
from floor_cpu import FORMULA, SGEMM_FLOPS, move, multiply, work
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sides_cpu import ROWS, SIDES, Row, check, make_call, make_inputs

import gdn_ops

EAGER = ("ours", "theirs")
# At most so many times what the machine cannot do faster.
FLOORS = 3
SYMBOLS = ("B", "T", "H", "HV", "K", "V")
# With these glibc keeps what is freed, up to 4 GiB, as allocators for servers do; without them it
# returns all that is larger than 32 MiB, and the system clears the pages of the next.
KEEP_MEMORY = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"
# A sample calls often enough to last this long, so that the clock and one interrupt do not show.
SAMPLE_SECONDS = 0.02


def timed(call: Callable[[], object], number: int) -> float:
    # The time of a single thread does not grow with what else runs on the machine.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(number):
        call()
    return (clock() - start) / number


def times_in_turn(row: Row, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each side and of the machine; they take turns at going first."""
    calls: dict[str, Callable[[], object]] = {"move": move(row), "multiply": multiply()}
    for side in SIDES:
        inputs = [x.requires_grad_(row.name == "train") for x in make_inputs(row)]
        calls[side] = make_call(row, side, inputs)
    for call in calls.values():
        call()
    numbers = {s: math.ceil(SAMPLE_SECONDS / timed(call, 1)) for s, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    for repeat in range(repeats):
        for side in list(calls) if repeat % 2 else reversed(calls):
            seconds[side].append(timed(calls[side], numbers[side]))
    gc.enable()
    return seconds


def resident_bytes(field: str) -> int:
    """``VmRSS``, the memory in use now, or ``VmHWM``, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} in /proc/self/status")


def peak_of_one_call(row: Row, side: str) -> int:
    """Bytes by which one call raises this process's memory, the results included."""
    tiny = Row(row.name, 1, 64, 2, 2 * row.HV // row.H, row.K, row.V)
    for shape in (tiny, row):  # the first is to load the libraries
        inputs = [x.requires_grad_(row.name == "train") for x in make_inputs(shape)]
        call = make_call(shape, side, inputs)
        if shape is tiny:
            call()
    if not sys.platform.startswith("linux"):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from now
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


def in_a_process(row: Row, threads: int, keeps_memory: bool, *what: str) -> Any:
    """What ``measure`` returns for ``row`` in a fresh process.

    An allocator keeps what earlier calls freed: in the process of another row theirs may find its
    temporaries there instead of asking the system, and be four times as fast.
    """
    command = [sys.executable, __file__, "--threads", str(threads)]
    command += ["--measure", str(ROWS.index(row)), *what]
    environment = {**os.environ, "GLIBC_TUNABLES": KEEP_MEMORY} if keeps_memory else None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def measure(number: str, what: str, value: str) -> Any:
    """``times`` with ``value`` repeats, or ``peak`` of the side ``value``, of one row."""
    row = ROWS[int(number)]
    return times_in_turn(row, int(value)) if what == "times" else peak_of_one_call(row, value)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def summary(row: Row, seconds: dict[str, list[float]], peak: dict[str, int]) -> dict:
    """The numbers of a row, the ratios, and whether the targets are met."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    moved, flops = work(row)
    rates = {"bytes_per_second": moved / median["move"]}
    rates["flops_per_second"] = SGEMM_FLOPS / median["multiply"]
    floor = max(median["move"], flops / rates["flops_per_second"])
    speed = median["theirs"] / median["ours"]
    compiled = median["theirs_compiled"] / median["ours_compiled"]
    memory = peak["ours"] / peak["theirs"] if peak else None
    met = {}
    if row.speed is not None:
        met[f"at least {row.speed:g} times as fast"] = speed >= row.speed
    if row.memory is not None:
        met[f"at most {row.memory:g} of the peak memory"] = memory <= row.memory
    met["compiled, faster than theirs compiled"] = compiled > 1
    for side, how in (("ours", "eager"), ("ours_compiled", "compiled")):
        met[f"{how}, at most {FLOORS} floors"] = median[side] <= FLOORS * floor
    return {
        "row": row.name,
        "shape": dict(zip(SYMBOLS, row.shape, strict=True)),
        "seconds": seconds,
        "median_seconds": median,
        "bytes": moved,
        "flops": flops,
        "rates": rates,
        "floor_seconds": floor,
        "floors": {side: median[side] / floor for side in SIDES},
        "peak_bytes": peak,
        "speed": speed,
        "speed_compiled": compiled,
        "memory": memory,
        "targets": met,
    }


def show(console: Console, results: list[dict]) -> None:
    title = (
        "medians in ms, in brackets as multiples of the floor; peak memory of one call, ours/theirs"
    )
    table = Table(title=title, box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("row")
    for column in (" ".join(SYMBOLS), "floor", *(side.replace("_", "\n") for side in SIDES), "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    verdicts = []
    for result in results:
        name, shape = result["row"], " ".join(map(str, result["shape"].values()))
        median, floors = result["median_seconds"], result["floors"]
        times = [f"{1e3 * median[side]:.2f} ({floors[side]:.1f})" for side in SIDES]
        peaks = "/".join(f"{p / 2**20:.0f}" for p in result["peak_bytes"].values())
        table.add_row(name, shape, f"{1e3 * result['floor_seconds']:.2f}", *times, peaks)
        for rule, met in result["targets"].items():
            verdicts.append(f"{'met   ' if met else 'MISSED'}  {name} {shape}: {rule}")
    console.print(table)
    console.print(FORMULA + "\n")
    console.print("\n".join(verdicts), highlight=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="samples of each side of a row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", help="only the rows of this name")
    parser.add_argument(
        "--keep-memory", action="store_true", help="by a malloc that keeps what is freed (glibc)"
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    rows = [row for row in ROWS if args.only in (None, row.name)]
    console = Console(width=None if sys.stdout.isatty() else 120)
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring in turn", total=len(rows))
        for row in rows:
            check(row)
            sides = EAGER if row.measures_memory else ()
            alone = functools.partial(in_a_process, row, args.threads, args.keep_memory)
            peak = {side: alone("peak", side) for side in sides}
            seconds = alone("times", str(args.repeats))
            results.append(summary(row, seconds, peak))
            progress.advance(task)
    show(console, results)
    import transformers

    machine = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gdn_ops": gdn_ops.__version__,
        "python": platform.python_version(),
    }
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    console.print(facts, highlight=False)
    if args.json:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        command = f"python -m benchmarks cpu --threads {args.threads} --repeats {args.repeats}"
        command += f" --only {args.only}" if args.only else ""
        command += " --keep-memory" if args.keep_memory else ""
        content = {"machine": machine, "date": date, "command": command, "rows": results}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
