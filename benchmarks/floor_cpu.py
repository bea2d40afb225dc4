"""What a CPU cannot do faster: moving what a row must move, and its least arithmetic.

The rates of the machine are measured in the process of the row, in turn with the operators, with as
many threads.
"""

from collections.abc import Callable
from typing import Protocol

import torch

FORMULA = (
    "floor: the longer of two times. Moving each input and each result once (for train also each "
    "gradient), as long as scaling a buffer in place takes that moves as many bytes. And the "
    "arithmetic of the token-by-token form at the rate of a float32 product of 1024 x 1024 "
    "matrices: 6 K V operations per token and value head (S k, S q and u k^T, 2 K V each), for "
    "train 18 K V (six products more in the backward, no state computed again)."
)

_SIZE = 1024
SGEMM_FLOPS = 2 * _SIZE**3


class Shape(Protocol):
    """A row of the benchmark."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def work(row: Shape) -> tuple[int, int]:
    """Bytes and floating-point operations of ``row``, as ``FORMULA`` says."""
    B, T, H, HV, K, V = row.shape
    tokens, o, state = B * T * (2 * H * K + HV * V + 2 * HV), B * T * HV * V, B * HV * V * K
    moved, flops = tokens + o + 2 * state, 6 * K * V * B * T * HV
    if row.name == "train":
        moved, flops = moved + tokens + state, 3 * flops
    return 4 * moved, flops


def move(row: Shape) -> Callable[[], object]:
    """A call that moves the bytes of ``row``: reads half of them and writes half of them."""
    buffer = torch.ones(work(row)[0] // 8)
    return lambda: buffer.mul_(1.0)


def multiply() -> Callable[[], object]:
    """A call of ``SGEMM_FLOPS`` operations."""
    x, y = torch.randn(2, _SIZE, _SIZE)
    out = torch.empty(_SIZE, _SIZE)
    return lambda: torch.mm(x, y, out=out)
