"""What a cache lends to the model code in place of a state, where it keeps one for each token.

The model code of transformers passes the state that it finds in a cache on to its functions
without looking into it. So a cache that keeps a state after every token, to be able to reject the
last of them, lends an object that updates its own pool, and the functions of ``functions.py`` leave
the update to it.

Source: docs/semantics.md, multi-token update; tests/test_assisted.py, tests/test_speculative.py.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor


class SlotState(ABC):
    """The states of one layer, with a slot for each token that may yet be rejected."""

    @abstractmethod
    def gated_delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, use_qk_l2norm: bool
    ) -> Tensor:
        """``o [B, T, HV, V]`` of the next tokens; their states stay in the pool."""

    @abstractmethod
    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        """``y [B, T, D]`` of the next inputs ``x [B, T, D]``, which stay in the pool."""


class SlotInputs(NamedTuple):
    """The next inputs of a convolution, with the state that their history is in."""

    state: SlotState
    x: Tensor  # [B, D, T]
