"""Libraries that compute the same, one file each; none is needed, and an absent one is named.

A module has ``NAME``, ``PACKAGE`` and ``make_call`` as ``benchmarks.contender.Contender`` says, and
imports its library inside of them. Each library gets native grouped heads and the layout of states
that it prefers, and computes gates and norms where ours does.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

PEERS = ("fla", "attention_gym", "flashinfer", "flash_qla", "vllm", "hugging_face")


def find(name: str) -> ModuleType:
    """The module of a peer."""
    return importlib.import_module(f"benchmarks.peers.{name}")


def add_packages_of_cute_dsl() -> None:
    """The CuTe DSL lies in a folder that its wheel adds to the path by a ``.pth`` file.

    Python reads those only where it is installed, not in folders of ``PYTHONPATH``.
    """
    for folder in list(sys.path):
        inner = Path(folder) / "nvidia_cutlass_dsl" / "dsl_packages"
        if inner.is_dir() and str(inner) not in sys.path:
            sys.path.append(str(inner))


add_packages_of_cute_dsl()
