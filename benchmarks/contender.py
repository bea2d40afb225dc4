"""What a library must have to be measured here, and the answer of one that serves no such row."""

from collections.abc import Callable
from typing import Protocol

import torch

from benchmarks.cases import Case
from benchmarks.rows import Row

Call = Callable[[], object]


class NotServed(Exception):
    """A library has nothing for a row; the text says what it lacks."""


class Contender(Protocol):
    """A module of ``benchmarks.peers``, or ``benchmarks.ours``."""

    NAME: str
    PACKAGE: str  # the distribution that has its version

    def make_call(self, row: Row, case: Case) -> Call:
        """A function without arguments that computes the row on the case's tensors.

        It returns ``o`` where it updates the case's pool in place (``(o, pool)`` where it has a
        pool of its own), ``(o, final_state)`` for ``prefill``, and the gradients ``(dq, dk, dv, dg,
        dbeta)`` for ``train``; states are V-major, views will do. It may be captured in a CUDA
        graph after it was called twice.

        Raises:
            ImportError: the library is not installed.
            NotServed: it has nothing for this row.
        """


def tokens_of(case: Case) -> tuple:
    """``q k v g beta``, normalised and with gates applied."""
    return case.q, case.k, case.v, case.g, case.beta


def gradients(function: Callable[..., tuple], case: Case) -> Call:
    """A training step: ``function`` of ``q k v g beta``, and the gradients of all five."""
    leaves = [x.detach().requires_grad_() for x in tokens_of(case)]

    def step() -> object:
        with torch.enable_grad():
            o = function(*leaves)[0]
            return torch.autograd.grad(o, leaves, case.do)

    return step
