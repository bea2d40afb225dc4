#!/usr/bin/env python3
"""What works under each release of transformers: `make transformers-matrix`.

    make transformers-matrix                     every release
    make transformers-matrix ARGS="4.57 5.23"    some of them

Tiny random models of every family that a release has, on a CPU in float32. A cell says yes where
the operators under the model are as accurate as the functions of transformers itself, measured
against float64 (tests/tolerance.py); `-` where transformers itself is wrong or refuses, `NO` where
only the operators are or do. The last column counts graphs of `torch.compile(fullgraph=True)`, of
prefill and of decode, for three lengths of a prompt. Reasons stand below the table. A release has a
virtual environment of its own, build/transformers-<version>, which shares all else with the one
that runs this; where TRANSFORMERS_PYTHON_5_8 names a Python, that one is used for 5.8.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RELEASES = {
    "4.57": "4.57.6",
    "5.4": "5.4.0",
    "5.8": "5.8.1",
    "5.14": "5.14.1",
    "5.15": "5.15.1",
    "5.17": "5.17.0",
    "5.20": "5.20.2",
    "5.23": "5.23.0",
    "5.24": "5.24.0",
}
CHECKS = ("prefill", "continuation", "decode", "generate", "training", "fullgraph")
LENGTHS = (70, 33, 130)


def set_up(version: str) -> Path:
    """The Python that has this release."""
    given = os.environ.get(f"TRANSFORMERS_PYTHON_{version.replace('.', '_')}")
    if given:
        return Path(given)
    folder = ROOT / "build" / f"transformers-{version}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists():
        print(f"transformers-matrix: setting up build/{folder.name}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        own = next(folder.glob("lib/python*/site-packages"))
        (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"transformers=={RELEASES[version]}"], check=True)
        stamp.touch()
    return python


def measure(version: str) -> dict[str, dict[str, list[str]]]:
    """By family and check, the cell and its reason, from a process that has the release."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [set_up(version), "-W", "ignore", __file__, "--here"]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure_here() -> dict[str, dict[str, list[str]]]:
    """The same in this process, whose transformers is the release."""
    from tiny_models import CLASSES

    found = {}
    for family in CLASSES:
        family_check = FamilyCheck(family)
        found[family] = {name: family_check.cell(name) for name in CHECKS}
        print(family, found[family], file=sys.stderr, flush=True)
    return found


class FamilyCheck:
    """The checks of one family."""

    def __init__(self, family: str) -> None:
        import torch
        from tiny_models import MODELING, model_of

        torch.set_num_threads(1)
        self.family, self.modeling, self.model = family, MODELING[family], model_of(family)

    def cell(self, check: str) -> list[str]:
        import torch

        with torch.set_grad_enabled(check == "training"):
            return list(getattr(self, check)())

    def prefill(self) -> tuple[str, str]:
        from tiny_models import tokens

        return self._compare(lambda m: {"logits": m(tokens(2, 70), use_cache=False).logits})

    def continuation(self) -> tuple[str, str]:
        return self._in_pieces([40, 9, 21])

    def decode(self) -> tuple[str, str]:
        return self._in_pieces([40, 1, 1, 1])

    def generate(self) -> tuple[str, str]:
        import torch
        from tiny_models import hugging_face_functions, tokens

        from gdn_ops.integrations.transformers import use_gdn_ops

        def text() -> torch.Tensor:
            options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            return self.model.generate(tokens(2, 40), max_new_tokens=24, **options)

        with hugging_face_functions():
            expected = text()
        with use_gdn_ops(self.model):
            return ("yes", "") if torch.equal(text(), expected) else ("NO", "other tokens")

    def training(self) -> tuple[str, str]:
        from tiny_models import gradients, tokens

        texts = [tokens(70, 3, seed) for seed in range(4)]
        batches = [[{"input_ids": ids, "labels": ids}] for ids in texts]
        return self._compare(lambda m: gradients(m, *batches), terms=210)

    def fullgraph(self) -> tuple[str, str]:
        """Graphs of prefill and of decode, with a static cache where the release has one."""
        import torch
        from tiny_models import tokens

        from gdn_ops.integrations.transformers import use_gdn_ops

        graphs: list[Any] = []
        counts = []

        def backend(graph: Any, _: Any) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        compiled = torch.compile(self.model, backend=backend, fullgraph=True, dynamic=True)
        try:
            with use_gdn_ops(self.model):
                caches = [self._new_cache("static") for _ in LENGTHS]
                for cache, length in zip(caches, LENGTHS, strict=True):
                    compiled(tokens(1, length), past_key_values=cache)
                counts.append(len(graphs))
                for cache in caches:
                    compiled(tokens(1, 1), past_key_values=cache)
                counts.append(len(graphs) - counts[0])
        except Exception as error:
            where = re.findall(r'(modeling_\w+\.py)", line (\d+), in (\w+)', str(error))
            place = " ".join(f"{file}:{line} {name}" for file, line, name in where[-1:])
            return (
                "-",
                f"{type(error).__name__}: {str(error).partition(chr(10))[0]} {place}".strip(),
            )
        return " + ".join(map(str, counts)), ""

    def _in_pieces(self, lengths: list[int]) -> tuple[str, str]:
        import torch
        from tiny_models import tokens

        ids = tokens(2, sum(lengths))

        def pieces(model: Any) -> dict[str, torch.Tensor]:
            cache = self._new_cache("dynamic")
            parts = ids.split(lengths, 1)
            return {"logits": torch.cat([model(x, past_key_values=cache).logits for x in parts], 1)}

        return self._compare(pieces, lambda m: {"logits": m(ids, use_cache=False).logits})

    def _new_cache(self, kind: str) -> Any:
        """A cache of transformers, or that of the family, which older releases have."""
        from tiny_models import new_cache

        for name, own in vars(self.modeling).items():
            if name.endswith("DynamicCache") and own.__module__ == self.modeling.__name__:
                return own(self.model.config)
        return new_cache(kind, self.model)

    def _compare(
        self,
        call: Callable[[Any], dict[str, Any]],
        exact_call: Callable[[Any], dict[str, Any]] | None = None,
        terms: int = 64,
    ) -> tuple[str, str]:
        """Whether ours is as accurate as what transformers computes, if that is right."""
        from tiny_models import exact_arithmetic, hugging_face_functions, wide
        from tolerance import assert_as_accurate_as_plain

        from gdn_ops.integrations.transformers import use_gdn_ops

        with exact_arithmetic():
            exact = (exact_call or call)(wide(self.model))
        try:
            with hugging_face_functions():
                plain = call(self.model)
        except Exception as error:
            return "-", f"{type(error).__name__}: {error}"
        for name, x in exact.items():
            error = (plain[name].double() - x).abs().max() / x.abs().max()
            if error > 1e-2:
                return "-", f"transformers itself is off by {error:.2g} of the largest {name}"
        try:
            with use_gdn_ops(self.model):
                ours = call(self.model)
            for name, x in exact.items():
                assert_as_accurate_as_plain(ours[name], x, plain[name], terms=terms, name=name)
        except Exception as error:
            return "NO", f"{type(error).__name__}: {error}"
        return "yes", ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="version", help=", ".join(RELEASES))
    parser.add_argument("--here", action="store_true", help="only the release that is installed")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure_here()))
        return 0
    versions = arguments.versions or list(RELEASES)
    unknown = [version for version in versions if version not in RELEASES]
    if unknown:
        parser.error(f"version must be one of {', '.join(RELEASES)}, got {unknown[0]!r}")
    reasons, failed = [], False
    print(f"| transformers | family | {' | '.join(CHECKS)} |\n|{'---|' * (2 + len(CHECKS))}")
    for version in versions:
        for family, cells in measure(version).items():
            values = [cells[check][0] for check in CHECKS]
            failed = failed or "NO" in values
            print(f"| {RELEASES[version]} | {family} | {' | '.join(values)} |", flush=True)
            reasons += [
                f"{RELEASES[version]} {family}, {check}: {cells[check][1]}"
                for check in CHECKS
                if cells[check][1]
            ]
    print("", *reasons, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
