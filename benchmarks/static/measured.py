"""What was measured on an H200, from benchmarks/results/."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def measured(gpu: str = "h200") -> dict[str, float]:
    """Microseconds by row, each from the newest file that has it."""
    found: dict[str, float] = {}
    for path in sorted(RESULTS.glob(f"{gpu}-*.json")):
        rows = json.loads(path.read_text())["rows"]
        found |= {row["row"]: float(row["us"]) for row in rows if "us" in row}
    return found
