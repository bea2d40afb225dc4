"""``python -m benchmarks table``: the measured tables of the pages, from the newest numbers.

A page has them between ``<!-- measured NAME -->`` and ``<!-- end of NAME -->``. ``--check`` fails
where a page differs from what ``--write`` would make of it.
"""

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.merge import across_commits
from benchmarks.report import number
from benchmarks.rows import MODELS, ONE_STEP, ROWS, Row, parse

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# Rows of the table in README.md, in words.
HEADLINE = {
    "decode 1x1 fp32": "decode in place, 1 sequence, float32 states",
    "decode 1x64 fp32": "the same, 64 sequences",
    "decode 1x1024 fp32": "the same, 1024 sequences",
    "decode 1x64 bf16": "decode in place, 64 sequences, bfloat16 states",
    "decode 1x1024 bf16": "the same, 1024 sequences",
    "verify 4x64 fp32": "verify 4 tokens, 64 sequences, a float32 state after each",
    "verify_once 4x64 fp32": "the same, one state at the end",
    "prefill 512x1 fp32": "prefill 1 x 512",
    "prefill 8192x1 fp32": "prefill 1 x 8192",
    "prefill 2048x4 fp32": "prefill 4 x 2048",
    "prefill 8192x4 fp32": "prefill 4 x 8192",
    "prefill_serving 8192x1 fp32": "prefill 1 x 8192, raw gates, into a pool",
    "train 8192x1 fp32": "forward and backward, 1 x 8192",
    "train 8192x4 fp32": "forward and backward, 4 x 8192",
}
# What the rows on a CPU are called.
CPU_ROWS = {
    "prefill": "prefill",
    "train": "training",
    "decode_": "decode in place",
    "decode": "decode, new states",
}


def newest(kind: str) -> tuple[Path, dict] | None:
    """The newest numbers of a ``gpu`` or ``cpu``, as their own date says.

    Of a GPU they are the latest of each row, over all runs on the newest one's kind.
    """
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        if kind in content.get("machine", {}):
            found[path] = content
    if not found:
        return None
    if kind == "gpu":
        return RESULTS, across_commits(list(found.values()))
    return max(found.items(), key=lambda item: item[1]["date"])


def by_row(content: dict) -> dict[str, dict]:
    return {result["row"]: result for result in content["rows"]}


def cell(entry: dict | None) -> str:
    """Microseconds, or a dash where something stands in the way; the whole table has the reason.

    With a star where they are not of the row's run.
    """
    if entry is None:
        return ""
    return number(entry["us"]) + "*" * ("beside" in entry) if "us" in entry else "-"


def every_number(path: Path) -> str:
    return f"Every number: [{path.name}]({path.relative_to(ROOT)})."


def machine_of(content: dict) -> str:
    """The GPU, the versions and the dates."""
    machine = content["machine"]
    *dates, last = dict.fromkeys(sorted(run["date"][:10] for run in content["runs"]))
    days = " and ".join(filter(None, (", ".join(dates), last)))
    facts = [f"torch {machine['torch']}", f"Triton {machine['triton']}", days]
    return f"**On one {machine['gpu']}** ({', '.join(facts)})"


def about(path: Path, content: dict) -> str:
    """What the numbers are, of which machine and run, and the ceilings."""
    ceilings = [run["ceilings"] for run in content["runs"]]
    copy = span([c["copy TB/s"] for c in ceilings], "{:.2f}")
    product = span([c["mm TFLOP/s"] for c in ceilings], "{:.0f}")
    return (
        f"{machine_of(content)}, 16 key heads, 32 value heads, `K = V = 128`, bfloat16 inputs, "
        f"CUDA graphs, medians in microseconds. An elementwise copy moved {copy} TB/s and a "
        f"bfloat16 8192^3 product ran at {product} TFLOP/s; the floor is the least traffic at the "
        f"bandwidth of such a copy in the row's run. The last column is the commit that a row is "
        f"of, with a star a peer's number beside an earlier one. {every_number(path)}"
    )


def span(numbers: list[float], form: str) -> str:
    """The least and the greatest, where they are written differently."""
    return " to ".join(dict.fromkeys(form.format(x) for x in (min(numbers), max(numbers))))


def grid(headers: list[str], lines: list[list[str]]) -> str:
    """A table of Markdown, without the columns in which nothing stands."""
    used = [i for i in range(len(headers)) if i == 0 or any(line[i] for line in lines)]
    rows = [headers, ["---"] * len(headers), *lines]
    return "\n".join("| " + " | ".join(row[i] for i in used) + " |" for row in rows)


def gpu_table(names: dict[str, str], content: dict) -> str:
    """Rows with a number of ours: it, it with the gates, the floor, the target, and each peer."""
    found = by_row(content)
    results = {row: found[row] for row in names if "us" in found.get(row, {})}
    peers = list(dict.fromkeys(name for r in results.values() for name in r.get("peers", {})))
    headers = ["", "ours", "with gates", "floor", "target", *peers, "commit"]
    lines = [
        [
            names[row],
            cell(result),
            cell(result.get("with_gates")),
            number(result.get("floor_us")),
            number(result.get("target_us")),
            *(cell(result.get("peers", {}).get(name)) for name in peers),
            result["commit"],
        ]
        for row, result in results.items()
    ]
    return grid(headers, lines)


def gpu() -> str | None:
    """The short table."""
    found = newest("gpu")
    return found and f"{about(*found)}\n\n{gpu_table(HEADLINE, found[1])}"


def row_names(rows: set[str]) -> str:
    """Names in the order of the suite; with sizes where others of that name are not in ``rows``."""
    named: dict[str, list[Row]] = {}
    for row in ROWS:
        named.setdefault(row.name, []).append(row)
    parts = []
    for name, all_rows in named.items():
        found = [str(row) for row in all_rows if str(row) in rows]
        parts += [name] if len(found) == len(all_rows) else found
    return ", ".join(parts)


def gpu_all() -> str | None:
    """Every row that was measured, and why a peer has no number."""
    found = newest("gpu")
    if found is None:
        return None
    path, content = found
    known = {str(row): str(row) for row in ROWS if row.name not in MODELS}
    reasons: dict[tuple[str, str], list[str]] = {}
    for row, result in by_row(content).items():
        others = {"ours": result} | result.get("peers", {})
        for name, entry in others.items():
            if "reason" in entry:
                reasons.setdefault((name, entry["reason"]), []).append(parse(row).name)
    missing = [
        f"- {name}, {', '.join(dict.fromkeys(rows))}: {reason}"
        for (name, reason), rows in reasons.items()
    ]
    absent = set(known) - set(by_row(content))
    if absent:
        missing.append(f"- {row_names(absent)}: no part of any run")
    steps = ", ".join(f"`{name}`" for name in ONE_STEP)
    notes = f"In {steps} the peers have the gates and the norm inside, as our second column has."
    parts = [about(path, content), gpu_table(known, content), notes]
    if missing:
        parts.append("Not measured:\n\n" + "\n".join(missing))
    return "\n\n".join(parts)


def called(entry: dict | None) -> str:
    """Microseconds as called from Python, and on the GPU alone in brackets."""
    text = cell(entry)
    return f"{text} ({number(entry['gpu_us'])})" if entry and "gpu_us" in entry else text


def gpu_models() -> str | None:
    """Rows of a layer and of a model, of the newest run that has them."""
    found = newest("gpu")
    rows = by_row(found[1]) if found else {}
    results = {row: r for row, r in rows.items() if parse(row).name in MODELS and "us" in r}
    if found is None or not results:
        return None
    path, content = found
    peers = list(dict.fromkeys(name for r in results.values() for name in r["peers"]))
    headers = ["", "ours, compiled", "ours, eager", "floor", *peers, "commit"]
    lines = [
        [
            row.removesuffix(" fp32"),
            called(result),
            called(result.get("eager")),
            number(result.get("floor_us")),
            *(called(result["peers"].get(name)) for name in peers),
            result["commit"],
        ]
        for row, result in results.items()
    ]
    text = (
        f"{machine_of(content)}, microseconds as called from Python, in brackets on the GPU alone, "
        f"from a cold cache. The floor is each weight and state at the copy's bandwidth, or the "
        f"products at that of the large one. {every_number(path)}"
    )
    return f"{text}\n\n{grid(headers, lines)}"


def cpu_cells(result: dict) -> list[str]:
    """A row on a CPU: milliseconds, and how many floors that is."""
    shape = ", ".join(map(str, result["shape"].values()))
    sides = [
        f"{number(1e3 * result['median_seconds'][side])} ({result['floors'][side]:.1f})"
        for side in ("ours", "ours_compiled", "theirs", "theirs_compiled")
    ]
    peak = " / ".join(f"{result['peak_bytes'][side] / 2**20:.0f}" for side in result["peak_bytes"])
    floor = number(1e3 * result["floor_seconds"])
    return [f"{CPU_ROWS[result['row']]} ({shape})", floor, *sides, peak]


def cpu_verdict(results: list[dict]) -> str:
    """How many of our times are within the aim of floors, and the other aims that are missed."""
    verdicts = [
        (f"{cpu_cells(result)[0]}: {rule}", "floors" in rule, met)
        for result in results
        for rule, met in result["targets"].items()
    ]
    floors = [met for _, about_floors, met in verdicts if about_floors]
    missed = [text for text, about_floors, met in verdicts if not about_floors and not met]
    text = f"At most 3 floors are the aim: {sum(floors)} of {len(floors)} of our times reach it."
    return f"{text} Another aim that is missed: {'; '.join(missed)}." if missed else text


def cpu() -> str | None:
    """Every row on a CPU."""
    found = newest("cpu")
    if found is None:
        return None
    path, content = found
    machine = content["machine"]
    text = (
        f"**On a CPU** ({machine['cpu']}, threads: {machine['threads']}, torch "
        f"{machine['torch'].split('+')[0]}, transformers {machine['transformers']}, float32, "
        f"{content['date'][:10]}, `{content['command']}`), milliseconds, in brackets multiples of "
        f"the floor; peak memory is ours / theirs. {every_number(path)}"
    )
    headers = ["`(B, T, H, HV, K, V)`", "floor", "ours", "ours, compiled"]
    headers += ["theirs", "theirs, compiled", "peak, MiB"]
    table = grid(headers, [cpu_cells(result) for result in content["rows"]])
    return f"{text}\n\n{table}\n\n{cpu_verdict(content['rows'])}"


BLOCKS: dict[str, Callable[[], str | None]] = {
    "gpu": gpu,
    "gpu-all": gpu_all,
    "gpu-models": gpu_models,
    "cpu": cpu,
}
PAGES = ("README.md", "benchmarks/README.md", "docs/performance-cpu.md")


def rewritten(page: str, text: str) -> str:
    """A page with its blocks as the numbers say; a block without numbers stays as it is."""
    # Links in blocks start at the root of the repository.
    here = os.path.relpath("benchmarks", Path(page).parent)
    link = "](" if here == "." else f"]({here}/"
    for name, make in BLOCKS.items():
        start, end = f"<!-- measured {name} -->", f"<!-- end of {name} -->"
        content = make() if start in text else None
        if content is not None:
            pattern = re.escape(start) + ".*?" + re.escape(end)
            block = f"{start}\n{content}\n{end}".replace("](benchmarks/", link)
            text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def stale() -> list[str]:
    """Pages that differ from the numbers."""
    texts = {page: (ROOT / page).read_text() for page in PAGES}
    return [page for page, text in texts.items() if rewritten(page, text) != text]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks table", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="put the tables into the pages")
    what.add_argument("--check", action="store_true", help="fail where a page is out of date")
    args = parser.parse_args(argv)
    if args.write:
        for page in stale():
            (ROOT / page).write_text(rewritten(page, (ROOT / page).read_text()))
            print(page)
    elif args.check:
        if stale():
            raise SystemExit(
                f"benchmarks table: {', '.join(stale())} must be as the numbers say; "
                "python -m benchmarks table --write"
            )
    else:
        print("\n\n".join(filter(None, (make() for make in BLOCKS.values()))))


if __name__ == "__main__":
    main()
