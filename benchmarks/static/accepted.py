"""The accepted figures, as data, and what has changed against them.

A file for each architecture and Triton: ``sm_90.json`` for the Triton of constraints.txt, with
which continuous tests run, and ``sm_90-triton-3.6.0.json`` for another. Figures of one Triton say
nothing of another's.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.static.figures import DIRECTIONS

FOLDER = Path(__file__).parent / "accepted"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
VERDICTS = {-1: "worse", 0: "changed", 1: "better"}
# Where the figures of kernels and of operators stand.
SECTIONS = ("kernels", "operators")

Figures = dict[str, dict[str, Any]]


def pinned_triton() -> str:
    """The Triton of constraints.txt."""
    pin = re.search(r"^triton==([\w.]+)", CONSTRAINTS.read_text(), re.MULTILINE)
    assert pin
    return pin[1]


def path_of(arch: str, triton: str) -> Path:
    """The file of an architecture and a version of Triton."""
    name = arch if triton == pinned_triton() else f"{arch}-triton-{triton}"
    return FOLDER / f"{name}.json"


def load(arch: str, triton: str) -> dict[str, Figures]:
    """The accepted figures, by section.

    Raises:
        FileNotFoundError: none were accepted with this Triton.
    """
    path = path_of(arch, triton)
    if not path.exists():
        known = ", ".join(sorted(p.name for p in FOLDER.glob(f"{arch}*.json"))) or "none"
        raise FileNotFoundError(
            f"no figures of {arch} were accepted with Triton {triton}, only {known}"
        )
    content = json.loads(path.read_text())
    assert content["triton"] == triton, path
    return {section: content[section] for section in SECTIONS}


def save(arch: str, triton: str, figures: Mapping[str, Figures]) -> Path:
    """Write them: sorted, a block for each kernel, a line for each figure."""
    lines = ["{", f' "arch": {json.dumps(arch)},', f' "triton": {json.dumps(triton)},']
    for section in SECTIONS:
        blocks = [_block(name, figures[section][name]) for name in sorted(figures[section])]
        lines += [f' "{section}": {{', ",\n".join(blocks), " },"]
    lines[-1] = " }"
    path = path_of(arch, triton)
    path.write_text("\n".join([*lines, "}", ""]))
    return path


def _block(name: str, figures: Mapping[str, Any]) -> str:
    lines = (f"   {json.dumps(key)}: {_line(figures[key])}" for key in sorted(figures))
    return f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }"


def _line(figure: Any) -> str:
    return json.dumps(figure, sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What has changed of a kernel or an operator.

    Args:
        name: Which one.
        verdict: worse, better, changed, new or gone.
        text: What has changed.
    """

    name: str
    verdict: str
    text: str

    @property
    def is_refused(self) -> bool:
        """Whether it fails the check; what is better is only noted."""
        return self.verdict != "better"

    def __str__(self) -> str:
        return f"{self.name}: {self.text}: {self.verdict}"


def _flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The opcodes beside the other figures."""
    opcodes: dict[str, Any] = figures.get("opcodes", {})
    return {name: x for name, x in figures.items() if name != "opcodes"} | opcodes


def _direction(figure: str, before: Any, after: Any) -> int:
    """Whether a change is better (1), worse (-1) or neither."""
    if DIRECTIONS[figure] == 0 or isinstance(after, str):
        return 0
    return DIRECTIONS[figure] if after > before else -DIRECTIONS[figure]


def compare(accepted: Figures, found: Figures) -> list[Finding]:
    """What is not as accepted, by kernel: worse, changed and better figures apart."""
    findings = []
    for name in sorted({*accepted, *found}):
        if name not in accepted:
            findings.append(Finding(name, "new", "nothing was accepted of it"))
        elif name not in found:
            findings.append(Finding(name, "gone", "accepted, and launched no more"))
        else:
            findings += _compare_one(name, _flat(accepted[name]), _flat(found[name]))
    return findings


def _compare_one(name: str, accepted: dict[str, Any], found: dict[str, Any]) -> list[Finding]:
    changes: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    for figure in DIRECTIONS:
        before, after = accepted.get(figure, 0), found.get(figure, 0)
        if before != after:
            changes[_direction(figure, before, after)].append(f"{figure} {before} -> {after}")
    return [
        Finding(name, VERDICTS[direction], ", ".join(changed))
        for direction, changed in changes.items()
        if changed
    ]
