"""The process that measures: rows come as JSON on its input, events go as JSON lines to its output.

It has a process of its own because a peer may hang, crash, or leave the GPU in an error that no
later call survives; then ``benchmarks.suite`` starts another, which goes on with the next one.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata

import torch

import gdn_ops
from benchmarks import ours
from benchmarks.entry import OUT_OF_TIME, Entry, Side, checked, measured, measured_in_turn
from benchmarks.peers import find
from benchmarks.rows import LAYOUTS, MODELS, Row, parse
from benchmarks.timing import ceilings

Say = Callable[..., None]
# What our own numbers of a row need at most; so much is kept for each of the rows to come.
SECONDS_A_ROW = 5


def version(package: str) -> str:
    """Of a distribution, or ``absent``; some are carried without their metadata."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def machine(peers: tuple[str, ...]) -> dict:
    """What the numbers depend on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "L2 MB": round(properties.L2_cache_size / 1e6),
        "SMs": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "python": platform.python_version(),
        "gdn_ops": gdn_ops.__version__,
        "peers": {find(name).NAME: version(find(name).PACKAGE) for name in peers},
    }


def entries(row: Row, peers: tuple[str, ...]) -> list[Entry] | list[Side]:
    """Everything to measure in a row."""
    if row.name in LAYOUTS:
        from benchmarks import layout

        return layout.entries(row)
    if row.name in MODELS:
        from benchmarks import models

        return models.sides(row, peers)
    from benchmarks import operators

    return operators.entries(row, peers)


def gpu_is_lost() -> bool:
    """After an illegal access every later call fails, in this process."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def measure_row(row: Row, job: dict, rows_to_come: int, say: Say) -> None:
    """Every entry of a row that an earlier worker did not finish."""
    done = job["done"].get(str(row), [])
    waiting: list[Side] = []
    errors: dict[str, dict] = {}
    for entry in entries(row, tuple(job["peers"])):
        if entry.name in done:
            continue
        is_ours = entry.name.startswith(ours.NAME) or row.name in LAYOUTS
        kept = 0 if is_ours else SECONDS_A_ROW * rows_to_come
        if time.time() + kept > job["deadline"]:
            say(row=str(row), name=entry.name, result={"reason": OUT_OF_TIME})
            continue
        say(row=str(row), name=entry.name, started=time.time())
        result = measured(entry) if isinstance(entry, Entry) else checked(entry)
        if isinstance(entry, Side) and "reason" not in result:
            waiting.append(entry)
            errors[entry.name] = result
            continue
        say(row=str(row), name=entry.name, result=result)
        if "reason" in result and gpu_is_lost():
            sys.exit("the GPU does not answer this process any more")
    for name, result in measured_in_turn(waiting).items():
        say(row=str(row), name=name, result=result | errors[name])
    if waiting:
        # The memory of CUDA graphs, and graphs that no other row can use.
        torch._dynamo.reset()


def main() -> None:
    # Libraries print to the standard output; the events have it for themselves.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**event: object) -> None:
        events.write(json.dumps(event) + "\n")

    if not torch.cuda.is_available():
        sys.exit("needs a GPU, and torch finds none")
    # One function is compiled for all rows: for two operators, two dtypes of states, tables, and
    # sizes of one. The default limit is 8.
    from torch import _dynamo

    _dynamo.config.recompile_limit = 64
    job = json.load(sys.stdin)
    rows = [parse(text) for text in job["rows"]]
    if job["first"]:
        say(machine=machine(tuple(job["peers"])))
        say(ceilings=ceilings())
        torch.cuda.empty_cache()
    for number, row in enumerate(rows):
        measure_row(row, job, len(rows) - number - 1, say)
        say(finished=str(row))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
