"""What was measured on an H200, from benchmarks/results/."""

import json
import re
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
# A line of a table: the row, and our time.
LINE = re.compile(r"^\| (\w+ \d+x\d+ \w+) \| ([\d.]+) \|", re.MULTILINE)


def measured(gpu: str = "h200") -> dict[str, float]:
    """Microseconds by row, each from the newest file that has it."""
    found: dict[str, float] = {}
    for path in sorted(
        RESULTS.glob(f"{gpu}-*"), key=lambda path: (path.stem, path.suffix != ".md")
    ):
        text = path.read_text()
        if path.suffix == ".json":
            rows = json.loads(text)["rows"]
            found |= {row["row"]: float(row["us"]) for row in rows if "us" in row}
        elif path.suffix == ".md":
            found |= {row: float(us) for row, us in LINE.findall(text)}
    return found
