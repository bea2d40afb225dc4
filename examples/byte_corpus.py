"""Real text that every Python installation carries: the sources of its standard library, as bytes.

One token is one byte. Byte 0, which no source file holds, stands before each file: it says where a
text begins and ends. About one file in 25 is held out, chosen by a checksum of its name, so that
the choice is the same on every machine and in every version of Python.
"""

import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
SEPARATOR = 0

# Tests are not part of every installation; the other two are tables rather than text.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_LEFT_OUT |= {"encodings", "pydoc_data"}


def source_files() -> list[tuple[str, Path]]:
    """Name and path of every file of the corpus, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    named = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    kept = ((name, path) for name, path in named if not _LEFT_OUT & set(name.parts))
    return sorted((name.as_posix(), path) for name, path in kept)


def is_held_out(name: str) -> bool:
    """Whether training leaves out the file of this name, such as ``json/decoder.py``."""
    return zlib.crc32(name.encode()) % 25 == 0


def encode(text: str) -> Tensor:
    """The bytes of a text as tokens, ``[T]``, int64, after a separator."""
    return torch.tensor([SEPARATOR, *text.encode()])


def decode(tokens: Tensor) -> str:
    """The text of tokens, ``[T]``; half characters and separators are shown, not hidden."""
    text = bytes(tokens.tolist()).decode(errors="replace")
    return text.replace(chr(SEPARATOR), "\N{SYMBOL FOR NULL}")


def load_corpus() -> tuple[Tensor, Tensor]:
    """Tokens of the training files and of the held-out files, each ``[T]``, uint8."""
    parts: dict[bool, bytearray] = {False: bytearray(), True: bytearray()}
    for name, path in source_files():
        parts[is_held_out(name)] += bytes([SEPARATOR]) + path.read_bytes()
    train, held_out = (torch.frombuffer(parts[key], dtype=torch.uint8) for key in (False, True))
    return train, held_out


def random_windows(tokens: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Windows of ``length + 1`` tokens at random places, ``[batch, length + 1]``, int64."""
    start = torch.randint(len(tokens) - length, (batch, 1), generator=generator)
    return tokens[start + torch.arange(length + 1)].long()


def even_windows(tokens: Tensor, count: int, length: int) -> Tensor:
    """Windows of ``length + 1`` tokens, evenly spread, ``[count, length + 1]``, int64."""
    start = torch.linspace(0, len(tokens) - length - 1, count).long()[:, None]
    return tokens[start + torch.arange(length + 1)].long()
