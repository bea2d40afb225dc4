#!/usr/bin/env python3
"""The proofs that need no GPU, with each torch that the package serves: `make matrix`.

    make matrix                      every version
    make matrix ARGS="2.11 2.13"     some of them

What torch generates and what Triton compiles differ from release to release, the operators do not:
so of the tests only those of generated and of compiled code run here. A version has a virtual
environment of its own, build/torch-<version>, some 5 GB where PyPI has wheels for CUDA only; where
the variable MATRIX_PYTHON_2_11 names a Python, that one is used for torch 2.11 and nothing is set
up.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Triton comes with torch, in the version that it names: 3.6.0, 3.7.1, ...
RELEASES = {"2.11": "2.11.0", "2.13": "2.13.0", "2.14": "2.14.1", "2.15": "2.15.0"}
PROOFS = (
    *("tests/test_lowering.py", "tests/test_epilogue.py"),
    *("tests/test_operators_lowered.py", "tests/test_autotuning.py", "tests/test_fallback.py"),
    *("tests/test_fake_gpu.py", "tests/test_cross_compile.py"),
)
NEEDED = ("numpy", "pytest", "hypothesis", "expecttest")
# torch decides on these itself.
FREE = re.compile(r"(torch|triton|setuptools|sympy|networkx|numpy)==")


def set_up(version: str) -> Path:
    """The Python that has this version of torch."""
    given = os.environ.get(f"MATRIX_PYTHON_{version.replace('.', '_')}")
    if given:
        return Path(given)
    folder = ROOT / "build" / f"torch-{version}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists():
        print(f"matrix: setting up build/{folder.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pin for pin in pins if not FREE.match(pin)))
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        install += ["--constraint", constraints]
        subprocess.run([*install, f"torch=={RELEASES[version]}", *NEEDED], check=True)
        stamp.touch()
    return python


def prove(version: str) -> tuple[str, ...]:
    """A row of the table: versions, tests, seconds."""
    start = time.monotonic()
    try:
        python = set_up(version)
    except subprocess.CalledProcessError:
        return version, "-", "-", "not installed", f"{time.monotonic() - start:.0f}"
    script = "import torch, triton; print(torch.__version__, triton.__version__)"
    versions = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    print(f"matrix: torch, triton {versions.stdout}", flush=True)
    start = time.monotonic()
    command = [python, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *PROOFS]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    summary = re.sub(r" in [\d.]+s.*", "", last) or f"exit status {run.returncode}"
    torch, triton = versions.stdout.split()
    return version, torch, triton, summary, f"{time.monotonic() - start:.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="version", help=", ".join(RELEASES))
    versions = parser.parse_args().versions or list(RELEASES)
    unknown = [version for version in versions if version not in RELEASES]
    if unknown:
        parser.error(f"version must be one of {', '.join(RELEASES)}, got {unknown[0]!r}")
    rows = [("version", "torch", "triton", "tests", "seconds"), *map(prove, versions)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return int(any(not re.match(r"\d+ passed", row[3]) for row in rows[1:]))


if __name__ == "__main__":
    sys.exit(main())
