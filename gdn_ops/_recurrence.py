"""What the chunked and the token-by-token implementation share: tokens, scans, first states.

Both are a ``scan``: it takes the states of a block of sequences, writes the outputs of their tokens
and returns the states after the last one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import Sizes, arithmetic_dtype
from ._sequences import Block, Bounds, as_index


class Prepared(NamedTuple):
    """Token arguments in the arithmetic dtype, none absent; ``q`` and ``k`` not normalised."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


class Tokens(NamedTuple):
    """The token arguments of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    scale: float
    use_qk_l2norm: bool

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor | None,
        scale: float | None,
        use_qk_l2norm: bool,
    ) -> "Tokens":
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return Tokens(q, k, v, g, beta, scale, use_qk_l2norm)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return arithmetic_dtype(self.q.dtype)

    def read(self, block: Block, t0: int, t1: int) -> "Tokens":
        """Tokens ``t0 .. t1 - 1`` of each sequence of a block: ``[n, t1 - t0, ...]``."""
        q, k, v = (_dense(block.read(x, t0, t1)) for x in self[:3])
        g, beta = (x if x is None else block.read(x, t0, t1) for x in self[3:5])
        return Tokens(q, k, v, g, beta, self.scale, self.use_qk_l2norm)

    def prepared(self) -> "Prepared":
        """The same in the arithmetic dtype, with values for absent arguments."""
        q, k, v = (x.to(self.dtype) for x in self[:3])
        g = v.new_zeros(v.shape[:3]) if self.g is None else self.g
        beta = v.new_ones(v.shape[:3]) if self.beta is None else self.beta.to(self.dtype)
        return Prepared(q, k, v, g, beta)


def _dense(x: Tensor) -> Tensor:
    """A slice ``[n, L, ...]``, copied in its own layout where its tokens are adjacent in memory.

    Channels are then ``T`` apart; where ``T`` is a power of two they fall into the same cache sets
    and each further read of the slice takes three times as long (AMD EPYC, torch 2.13, 2026-11-24).
    """
    return x.clone() if x.stride(1) == 1 and x.stride(-1) != 1 else x


# Where given, `store(t, S)` is to be called with the states after token t of the block.
Store = Callable[[int, Tensor], None]

# scan(block, S, store) -> S after the last token of each sequence of the block; it writes their
# outputs. S is [n, HV, V, K], contiguous, and the scan may overwrite it.
Scan = Callable[[Block, Tensor, Store | None], Tensor]

# start(tokens, o) -> scan: what is done once a call, whatever the number of blocks.
StartScan = Callable[[Tokens, Tensor], Scan]


def _state_bytes(tokens: Tokens) -> int:
    HV, V = tokens.v.shape[2:]
    return int(HV * V * tokens.q.shape[3] * tokens.dtype.itemsize)


def state_blocks(tokens: Tokens, bounds: Bounds, live: Sequence[int] | None = None) -> list[Block]:
    """Blocks of sequences whose states stay in the cache together."""
    live = range(bounds.count) if live is None else live
    return list(bounds.blocks(tokens.q, _state_bytes(tokens), live))


def initial_states(
    initial_state: Tensor | None, block: Block, tokens: Tokens, sizes: Sizes
) -> Tensor:
    """The states ``[n, HV, V, K]`` that a block starts from; never the caller's own memory."""
    if initial_state is None:
        shape = (len(block.ids), sizes.HV, sizes.V, sizes.K)
        return tokens.q.new_zeros(shape, dtype=tokens.dtype)
    index = as_index(block.ids, initial_state.device)
    rows = initial_state[index]
    return rows.to(tokens.dtype, memory_format=torch.contiguous_format, copy=True)
