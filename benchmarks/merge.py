"""``python -m benchmarks merge A.json B.json -o OUT.json``: the rows of several runs in one file.

The runs must be of one kind of GPU, one torch, one Triton and one commit. Of a row that several
runs measured the latest is kept, as a whole: what stands in one row was measured side by side.
"""

import argparse
import json
from pathlib import Path

from benchmarks.rows import ROWS

SAME = ("gpu", "torch", "triton", "commit")


def facts(content: dict) -> dict[str, str | None]:
    """What must not differ between runs."""
    found = {"commit": content.get("commit")} | content["machine"]
    return {name: found.get(name) for name in SAME}


def merged(contents: dict[str, dict]) -> dict:
    """One content of several, by the names of their files; each keeps its command in ``runs``.

    A row without a number of ours never takes the place of one that has it.

    Raises:
        ValueError: the runs differ in a GPU, a version or a commit, or one is not of a GPU.
    """
    for name, content in contents.items():
        if "gpu" not in content.get("machine", {}):
            raise ValueError(f"{name} must be a run of python -m benchmarks gpu")
    in_order = sorted(contents.items(), key=lambda item: item[1]["date"])
    first_name, first = in_order[0]
    rows: dict[str, dict] = {}
    versions: dict[str, str] = {}
    runs: list[dict] = []
    for name, content in in_order:
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
    last = in_order[-1][1]
    order = [str(row) for row in ROWS]
    return last | {
        "machine": last["machine"] | {"peers": versions},
        "runs": runs,
        "rows": [rows[row] for row in order if row in rows],
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
