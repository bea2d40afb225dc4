"""A fingerprint of both packages in the key of torch's compile caches.

Inductor's caches on disk hash torch's own sources and the graph, not a lowering that lives outside
torch: without this an edited kernel would silently be served from the cache as it was.
"""

import functools
import hashlib
from pathlib import Path

import torch

_NAME = "gdn-ops"


@functools.cache
def fingerprint() -> str:
    """Hash of every source file of ``gdn_ops`` and ``lowering``."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for package in ("gdn_ops", "lowering"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def add() -> None:
    """Append the fingerprint to ``torch.compiler.config.cache_key_tag``, once."""
    if _entry() not in _entries():
        torch.compiler.config.cache_key_tag = "|".join([*_entries(), _entry()])


def remove() -> None:
    """Take it away again, and leave what the user had there."""
    rest = [entry for entry in _entries() if entry != _entry()]
    torch.compiler.config.cache_key_tag = "|".join(rest)


def _entry() -> str:
    return f"{_NAME}:{fingerprint()}"


def _entries() -> list[str]:
    return [entry for entry in torch.compiler.config.cache_key_tag.split("|") if entry]
