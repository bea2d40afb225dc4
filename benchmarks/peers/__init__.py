"""Libraries that compute the same, one file each; none is needed, and an absent one is named.

A module has ``NAME``, ``PACKAGE`` and ``make_call`` as ``benchmarks.contender.Contender`` says, and
imports its library inside of them. Each library gets native grouped heads and the layout of states
that it prefers, and computes gates and norms where ours does.
"""

import importlib
from types import ModuleType

PEERS = ("fla", "attention_gym", "flashinfer", "flash_qla", "vllm", "hugging_face")


def find(name: str) -> ModuleType:
    """The module of a peer."""
    return importlib.import_module(f"benchmarks.peers.{name}")
