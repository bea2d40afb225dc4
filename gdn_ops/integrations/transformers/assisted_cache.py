"""Cache layers for assisted generation: a state for each token that may yet be rejected.

    VerifySlots   of the model: a step brings all drafted tokens, and then some are rejected
    DraftSlots    of a draft model: a step brings a token, and a rejection goes back over several

A rejection moves where the next step reads; no state is copied. A prompt goes through the chunked
form but for its last ``S`` tokens, among which are the first drafted ones.

Source: docs/semantics.md, multi-token update; tests/test_assisted.py.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gdn_ops.causal_conv1d import causal_conv1d, causal_conv1d_
from gdn_ops.chunk import chunk_
from gdn_ops.integrations.transformers.slot_layer import LendingLayer
from gdn_ops.integrations.transformers.slot_state import SlotState
from gdn_ops.recurrent import recurrent_


class Slots(SlotState):
    """What both kinds share: ``S`` slots a row, and how many of the last tokens can go."""

    def __init__(self, S: int, state_dtype: torch.dtype) -> None:
        self.S = S
        self.removable = 0
        self._state_dtype = state_dtype
        self._state: Tensor | None = None  # [S, B, HV, V, K]
        self._conv: Tensor | None = None
        self._convolved = 0  # tokens of which the gated delta rule has not heard yet

    def reserve(self, S: int) -> None:
        """Have at least ``S`` slots a row."""
        if S > self.S:
            self._grow(S - self.S)
            self.S = S

    def remove(self, count: int) -> None:
        """Reject the last ``count`` tokens.

        Raises:
            ValueError: ``count`` is more than are kept.
        """
        if count > self.removable:
            raise ValueError(
                f"crop: tokens_to_remove must be at most {self.removable} tokens of the last step, "
                f"got {count}"
            )
        self.removable -= count
        self._step_back(count)

    def gated_delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, use_qk_l2norm: bool
    ) -> Tensor:
        B, T, HV, V = v.shape
        if self._convolved != T:
            raise RuntimeError(
                f"assisted generation: the model code must convolve {T} tokens through "
                f"causal_conv1d_fn before their gated delta rule, got {self._convolved}"
            )
        self._convolved = 0
        if self._state is None:
            dtype = torch.float64 if v.dtype == torch.float64 else self._state_dtype
            self._state = v.new_zeros(self.S, B, HV, V, q.shape[-1], dtype=dtype)
        head = max(0, T - self.S)
        parts = []
        if head > 0:
            q0, k0, v0, g0, beta0 = (x[:, :head] for x in (q, k, v, g, beta))
            state = self._state[self._column()]
            parts.append(chunk_(q0, k0, v0, g0, beta0, state, None, use_qk_l2norm=use_qk_l2norm))
        last = tuple(x[:, head:] for x in (q, k, v, g, beta))
        parts.append(self._update(last, self._state, use_qk_l2norm))
        return torch.cat(parts, 1) if head > 0 else parts[0]

    def _table(self, columns: Sequence[int], like: Tensor) -> Tensor:
        """Slots ``[B, len(columns)]`` of a pool whose slots lie column after column."""
        assert self._state is not None
        B = self._state.shape[1]
        rows = torch.arange(B, dtype=torch.int32, device=like.device)
        return torch.tensor(columns, dtype=torch.int32, device=like.device) * B + rows[:, None]

    @abstractmethod
    def _column(self) -> int:
        """Where the state after the last token is."""

    @abstractmethod
    def _update(self, tokens: tuple[Tensor, ...], state: Tensor, use_qk_l2norm: bool) -> Tensor:
        """Outputs of at most ``S`` tokens; the state after each of them stays in ``state``."""

    @abstractmethod
    def _step_back(self, count: int) -> None: ...

    @abstractmethod
    def _grow(self, count: int) -> None: ...


class VerifySlots(Slots):
    """A step of ``L <= S`` tokens writes slots ``0 .. L-1`` and starts where the last one ended.

    That is ``num_accepted_tokens`` of the operators: of the tokens of the last step those that were
    not rejected.
    """

    def __init__(self, S: int, state_dtype: torch.dtype) -> None:
        super().__init__(S, state_dtype)
        self._accepted = 1

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        B, T, D = x.shape
        W = weight.shape[1]
        if self._conv is None:
            self._conv = x.new_zeros(B, D, W - 1 + self.S - 1)
        head = max(0, T - self.S)
        parts = []
        if head > 0:
            # A plain update of the columns that hold the last inputs now.
            recent = self._conv[:, :, self._accepted - 1 : self._accepted + W - 2]
            parts.append(causal_conv1d_(x[:, :head], weight, bias, recent, activation=activation))
        last, accepted = x[:, head:], self._counts(x)
        parts.append(
            causal_conv1d_(last, weight, bias, self._conv, None, accepted, activation=activation)
        )
        self._convolved = T
        return torch.cat(parts, 1) if head > 0 else parts[0]

    def _counts(self, like: Tensor) -> Tensor:
        return torch.full((like.shape[0],), self._accepted, dtype=torch.int32, device=like.device)

    def _column(self) -> int:
        return self._accepted - 1

    def _update(self, tokens: tuple[Tensor, ...], state: Tensor, use_qk_l2norm: bool) -> Tensor:
        q, k, v, g, beta = tokens
        table = self._table(range(self.S), q)
        pool, accepted = state.flatten(0, 1), self._counts(q)
        o = recurrent_(q, k, v, g, beta, pool, table, accepted, use_qk_l2norm=use_qk_l2norm)
        # All of them, until some are removed. The state before the first of them is overwritten.
        self._accepted = q.shape[1]
        self.removable = self._accepted - 1
        return o

    def _step_back(self, count: int) -> None:
        self._accepted -= count

    def _grow(self, count: int) -> None:
        if self._state is not None and self._conv is not None:
            more = self._state.new_zeros(count, *self._state.shape[1:])
            self._state = torch.cat([self._state, more])
            self._conv = torch.nn.functional.pad(self._conv, (0, count))


class DraftSlots(Slots):
    """A ring: a token reads the slot of the one before it and writes the next."""

    def __init__(self, S: int, state_dtype: torch.dtype) -> None:
        super().__init__(S, state_dtype)
        self._last = 0

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        B, T, D = x.shape
        W = weight.shape[1]
        if self._conv is None:
            self._conv = x.new_zeros(self.S, B, D, W - 1)
        recent = self._conv[self._last]
        y, _ = causal_conv1d(x, weight, bias, recent, activation=activation)
        windows = torch.cat([recent, x.transpose(1, 2)], 2).unfold(2, W - 1, 1)  # [B, D, T+1, W-1]
        columns = self._next(min(T, self.S))
        self._conv[columns] = windows[:, :, -len(columns) :].permute(2, 0, 1, 3)
        self._convolved = T
        return y

    def _next(self, count: int) -> list[int]:
        return [(self._last + 1 + t) % self.S for t in range(count)]

    def _column(self) -> int:
        return self._last

    def _update(self, tokens: tuple[Tensor, ...], state: Tensor, use_qk_l2norm: bool) -> Tensor:
        q, k, v, g, beta = tokens
        columns = self._next(q.shape[1])
        o = recurrent_(
            q,
            k,
            v,
            g,
            beta,
            state.flatten(0, 1),
            self._table(columns, q),
            read_indices=self._table([self._last], q)[:, 0],
            use_qk_l2norm=use_qk_l2norm,
        )
        self._last = columns[-1]
        self.removable = min(self.removable + q.shape[1], self.S - 1)
        return o

    def _step_back(self, count: int) -> None:
        self._last = (self._last - count) % self.S

    def _grow(self, count: int) -> None:
        """The new slots come after the last one, so that the way back stays whole."""

        def widen(pool: Tensor) -> Tensor:
            old = pool.roll(self.S - 1 - self._last, 0)
            return torch.cat([old, old.new_zeros(count, *old.shape[1:])])

        if self._state is not None and self._conv is not None:
            self._state, self._conv = widen(self._state), widen(self._conv)
            self._last = self.S - 1


class SlotLayer(LendingLayer):
    """A layer of a cache for assisted generation: one that can be cropped."""

    is_croppable = True
    slots: Slots

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; as everywhere in transformers, their number is negative."""
        self.slots.remove(-tokens_to_remove)

    def reset(self) -> None:
        self.lend(type(self.slots)(self.slots.S, self.slots._state_dtype))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("reorder_cache: a cache of assisted generation serves no beams")
