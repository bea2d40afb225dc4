#!/usr/bin/env python3
"""All that only a GPU can prove, in one call of a few minutes: `make gpu-test`.

    make gpu-test
    make gpu-test ARGS="--summary benchmarks/results/gpu-test-h200.md"

The tests marked ``gpu``, in several processes where pytest-xdist is there, and beside them
tests/sanitized_calls.py under each tool of compute-sanitizer that the machine has. Needs no
network, and sets nothing up: the Python that runs this has torch, Triton and pytest.
"""

import argparse
import concurrent.futures
import datetime
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck")


class Result(NamedTuple):
    """A row of the summary."""

    name: str
    passed: bool
    said: str
    seconds: float
    output: str


def call(
    name: str, command: list[str], said: str, environment: dict[str, str] | None = None
) -> Result:
    """Run a command; ``said`` finds the line of its output that sums it up."""
    start = time.monotonic()
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": paths} | (environment or {})
    done = subprocess.run(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = re.findall(said, done.stdout, re.MULTILINE)
    summary = lines[-1].strip("= ") if lines else f"exit status {done.returncode}"
    seconds = time.monotonic() - start
    print(f"gpu-test: {name}: {summary}, {seconds:.0f} s", flush=True)
    return Result(name, done.returncode == 0 and bool(lines), summary, seconds, done.stdout)


def tests(name: str, marks: str, processes: int, chosen: list[str]) -> Result:
    """Those with these marks; no process of pytest-xdist for none."""
    spread = ["-n", str(processes)] if processes and importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", marks, "--ignore", "tests/interpreted"]
    # pytest-benchmark, which some machines have, warns of other processes, and warnings are errors.
    command += ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short"]
    command += ["--show-capture=no", *spread, *chosen]
    return call(name, command, r"^.*(?:passed|failed|error).* in .*$", {"GDN_REQUIRE_GPU": "1"})


def sanitized(tool: str, dtype: str) -> Result:
    sanitizer = shutil.which("compute-sanitizer")
    name = f"{tool} {dtype}"
    if sanitizer is None:
        return Result(name, False, "there is no compute-sanitizer on PATH", 0.0, "")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
    command += [sys.executable, "tests/sanitized_calls.py", dtype]
    environment = {}
    if tool == "initcheck":
        # It sees memory that CUDA gave out, not what torch gives out a second time.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        command.append("--pointers")
    if tool == "racecheck":
        # Of a prefill in one kernel it reports what barriers in memory order, as
        # tests/test_fused_protocol.py shows (benchmarks/results/h200-2026-11-30.md).
        command.append("--two-kernels")
    result = call(name, command, r"^=+ (?:ERROR|RACECHECK) SUMMARY.*$", environment)
    return without_known(result) if tool == "racecheck" else result


def without_known(result: Result) -> Result:
    """The result of racecheck without reports of what is no race.

    Threads that hold the same number store it to the same place with one instruction, as Triton
    lays out what is smaller than a warp. A race has two instructions, or a reader.

    Where Triton starts roles of warps, each warp reads its role from memory between two barriers of
    all warps, which racecheck does not see (benchmarks/results/h200-2026-11-30.md).
    """
    reports = re.findall(
        r"Race reported between (.+ access at .+)\n((?:=+\s+and .+ access at .+ \[.*\n)+)",
        result.output,
    )
    equal = roles = 0
    for first, others in reports:
        places = [first, *re.findall(r"and (.+ access at .+) \[", others)]
        equal += first.startswith("Write") and set(places) == {first}
        roles += all(map(starts_roles, places))
    reported = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", result.output)
    if reported is None or not int(reported.group(1)) == len(reports) == equal + roles:
        return result
    said = f"no race; {equal} stores of one number by several threads, {roles} starts of roles"
    return result._replace(passed="called all" in result.output, said=said)


def starts_roles(place: str) -> bool:
    """Whether it is the line of a kernel's name, or the one that starts its roles."""
    found = re.search(r" in (?:.*/)?(\w+\.py):(\d+)$", place)
    source = found and ROOT / "gdn_ops" / "kernels" / found.group(1)
    text = source.read_text() if source and source.exists() else ""
    if "warp_specialize(" not in text:
        return False
    lines = text.splitlines()[int(found.group(2)) - 1 :]
    # Triton gives the call the line of the condition that it is under.
    return lines[0].startswith("def ") or any("warp_specialize(" in line for line in lines[:2])


def gpu() -> str:
    script = "import torch, triton; print(torch.cuda.get_device_name(), 'torch', "
    script += "torch.__version__, 'triton', triton.__version__)"
    found = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True)
    return found.stdout.strip() or "no GPU"


def table(results: list[Result]) -> str:
    today = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [
        f"`make gpu-test` on {gpu()}, {today}",
        "",
        "| what | result | seconds |",
        "|---|---|---|",
    ]
    for row in results:
        verdict = "" if row.passed else "**failed:** "
        lines.append(f"| {row.name} | {verdict}{row.said} | {row.seconds:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--summary", type=Path, help="where to write the table, as Markdown")
    parser.add_argument("--processes", type=int, default=6, help="of the tests. Default: 6")
    parser.add_argument("tests", nargs="*", help="arguments of pytest. Default: all tests")
    args = parser.parse_args()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        marks = "gpu and not alone"
        futures = [pool.submit(tests, "tests", marks, args.processes, args.tests)]
        futures += [
            pool.submit(sanitized, tool, dtype)
            for tool in TOOLS
            for dtype in ("float32", "bfloat16")
        ]
        results = [future.result() for future in futures]
    if not args.tests:
        results.append(tests("tests of the host's time, alone", "gpu and alone", 0, []))
    for row in results:
        if not row.passed:
            print(f"\n--- {row.name}", row.output[-6000:], sep="\n")
    text = table(results)
    print(f"\n{text}", flush=True)
    if args.summary:
        args.summary.write_text(text + "\n")
    return 0 if all(row.passed for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
