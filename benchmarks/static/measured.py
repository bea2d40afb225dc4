"""What was measured on an H200, from benchmarks/results/."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def measured(gpu: str = "h200") -> dict[str, float]:
    """Microseconds by row, each from the newest run that has it."""
    contents = [json.loads(path.read_text()) for path in RESULTS.glob(f"{gpu}-*.json")]
    found: dict[str, float] = {}
    for content in sorted(contents, key=lambda content: content["date"]):
        found |= {row["row"]: float(row["us"]) for row in content["rows"] if "us" in row}
    return found
