"""``python -m benchmarks merge A.json B.json -o OUT.json``: the rows of several runs in one file.

The runs must be of one kind of GPU, one torch, one Triton and one commit. Of a row that several
runs measured the latest is kept, as a whole: what stands in one row was measured side by side.
"""

import argparse
import json
from pathlib import Path

from benchmarks.entry import OUT_OF_TIME
from benchmarks.rows import ROWS

SAME = ("gpu", "torch", "triton", "commit")


def facts(content: dict, names: tuple[str, ...] = SAME) -> dict[str, str | None]:
    """What must not differ between runs."""
    found = {"commit": content.get("commit")} | content["machine"]
    return {name: found.get(name) for name in names}


def across_commits(contents: list[dict]) -> dict:
    """All runs on a GPU of the newest one's kind as one content: of each row the latest, whole.

    ``runs`` has their commits, each row that of its own, and where only time was short for a peer,
    its number of an earlier run, whose commit is in ``beside``.
    """
    newest = max(contents, key=lambda content: content["date"])
    kind = facts(newest, SAME[:-1])
    runs = [x for x in contents if facts(x, SAME[:-1]) == kind]
    rows: dict[str, dict] = {}
    for content in sorted(runs, key=lambda content: content["date"]):
        for found in content["rows"]:
            if "us" in found:
                result = {"commit": content["commit"]} | found
                earlier = rows.get(result["row"], {})
                peers = result.get("peers", {})
                kept = {
                    name: peer | {"beside": peer.get("beside", earlier["commit"])}
                    for name, peer in earlier.get("peers", {}).items()
                    # Without errors of a check its results may be wrong.
                    if "us" in peer and "errors" in peer and lacks_time(peers.get(name))
                }
                rows[result["row"]] = result | {"peers": peers | kept}
    return newest | {"runs": runs, "rows": in_order(rows)}


def in_order(rows: dict[str, dict]) -> list[dict]:
    """Results by their rows, as the suite has these."""
    return [rows[row] for row in map(str, ROWS) if row in rows]


def lacks_time(peer: dict | None) -> bool:
    """Whether a peer was not tried, or the time of the machine was up."""
    return peer is None or peer.get("reason") == OUT_OF_TIME


def merged(contents: dict[str, dict]) -> dict:
    """One content of several, by the names of their files; each keeps its command in ``runs``.

    A row without a number of ours never takes the place of one that has it.

    Raises:
        ValueError: the runs differ in a GPU, a version or a commit, or one is not of a GPU.
    """
    for name, content in contents.items():
        if "gpu" not in content.get("machine", {}):
            raise ValueError(f"{name} must be a run of python -m benchmarks gpu")
    by_date = sorted(contents.items(), key=lambda item: item[1]["date"])
    first_name, first = by_date[0]
    rows: dict[str, dict] = {}
    versions: dict[str, str] = {}
    runs: list[dict] = []
    for name, content in by_date:
        for fact, value in facts(content).items():
            if value != facts(first)[fact]:
                was = facts(first)[fact]
                raise ValueError(f"{name} must have the {fact} of {first_name}, {was}, got {value}")
        for result in content["rows"]:
            if "us" in result or "us" not in rows.get(result["row"], {}):
                rows[result["row"]] = result
        peers = content["machine"].get("peers", {})
        versions |= {peer: v for peer, v in peers.items() if v != "absent" or peer not in versions}
        about = {key: content.get(key) for key in ("date", "command", "ceilings")}
        runs += content.get("runs", [about])
    last = by_date[-1][1]
    return last | {
        "machine": last["machine"] | {"peers": versions},
        "runs": runs,
        "rows": in_order(rows),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks merge", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.json")
    args = parser.parse_args(argv)
    try:
        content = merged({str(path): json.loads(path.read_text()) for path in args.files})
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks merge: {error}") from None
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    measured = sum("us" in result for result in content["rows"])
    print(f"{args.output}: {len(content['rows'])} rows, {measured} of them measured")


if __name__ == "__main__":
    main()
