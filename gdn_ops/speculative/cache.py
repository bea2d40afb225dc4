"""The cache of a batch whose rows are at different places: fixed tensors, updated in place.

    recurrent layer    pool [B * S + B, HV, V, K], slot table[n, t] after token t of row n's step;
                       the last B slots are scratch, for what a draft model draws
    convolution        pool [B, D, W - 1 + S - 1], and scratch [B, D, W - 1]
    attention layer    keys and values [B, heads, length, size], each row written at its own places

Source: docs/semantics.md, multi-token update; tests/test_speculative.py.
"""

import contextlib
from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from gdn_ops.causal_conv1d import causal_conv1d, causal_conv1d_
from gdn_ops.chunk import chunk_
from gdn_ops.integrations.transformers.slot_layer import LendingLayer
from gdn_ops.integrations.transformers.slot_state import SlotState
from gdn_ops.recurrent import recurrent_


class Phase(Enum):
    """What a call of the model does with the cache."""

    PREFILL = auto()  # one row starts from its prompt
    VERIFY = auto()  # every row brings S tokens, after those that it kept of the last S
    BRANCH = auto()  # every row brings one token, and its state goes to scratch
    DRAW = auto()  # the next token of that branch


class Rows:
    """Where each row is: what all layers of a cache share."""

    def __init__(self, batch_size: int, S: int, length: int, device: torch.device) -> None:
        self.batch_size, self.S, self.length = batch_size, S, length
        places = torch.arange(batch_size * S, dtype=torch.int32, device=device)
        self.table = static(places.view(batch_size, S))
        self.scratch = static(
            torch.arange(batch_size, dtype=torch.int32, device=device) + batch_size * S
        )
        # Tokens kept of the last step; 0 makes a row padding, which is how an idle one is skipped.
        self.accepted = static(torch.zeros(batch_size, dtype=torch.int32, device=device))
        self.phase = Phase.PREFILL
        self.places: tuple[Tensor, Tensor] | None = None  # the rows, and their positions [n, T]

    @contextlib.contextmanager
    def during(self, phase: Phase, which: Tensor, positions: Tensor) -> Iterator[None]:
        """For one call of the model. A graph would return what stayed in the object."""
        self.phase, self.places = phase, (which, positions)
        yield
        self.phase, self.places = Phase.PREFILL, None

    def visible(self, positions: Tensor) -> Tensor:
        """Which keys the token at each position sees, ``[B, 1, T, length]``."""
        keys = torch.arange(self.length, device=positions.device)
        return (keys <= positions[:, :, None])[:, None]


def static(x: Tensor) -> Tensor:
    """A tensor that stays where it is, so that a CUDA graph may write it."""
    torch._dynamo.mark_static_address(x)
    return x


class RowStates(SlotState):
    """The pools of one recurrent layer, which the first call of the model allocates."""

    def __init__(self, rows: Rows, state_dtype: torch.dtype, exact: bool) -> None:
        self._rows = rows
        self._state_dtype = state_dtype
        self._exact = exact
        self._state: Tensor | None = None
        self._conv: Tensor | None = None
        self._conv_scratch: Tensor | None = None

    def gated_delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, use_qk_l2norm: bool
    ) -> Tensor:
        rows = self._rows
        if self._state is None:
            HV, V = v.shape[2:]
            slots = rows.batch_size * (rows.S + 1)
            dtype = torch.float64 if v.dtype == torch.float64 else self._state_dtype
            self._state = static(v.new_zeros(slots, HV, V, q.shape[-1], dtype=dtype))
        state, table, accepted = self._state, rows.table, rows.accepted
        options: dict[str, Any] = {"use_qk_l2norm": use_qk_l2norm}
        if rows.phase is Phase.PREFILL:
            assert rows.places is not None
            slot = table[:, 0][rows.places[0]]
            fresh = torch.zeros_like(slot, dtype=torch.bool)
            return chunk_(q, k, v, g, beta, state, slot, fresh, **options)
        options["exact"] = self._exact
        if rows.phase is Phase.VERIFY:
            return recurrent_(q, k, v, g, beta, state, table, accepted, **options)
        scratch = torch.where(accepted > 0, rows.scratch, -1)
        if rows.phase is Phase.BRANCH:
            last = (accepted - 1).clamp(min=0).long()
            options["read_indices"] = table.gather(1, last[:, None])[:, 0]
        return recurrent_(q, k, v, g, beta, state, scratch, **options)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        rows = self._rows
        D, W = weight.shape
        if self._conv is None:
            self._conv = static(x.new_zeros(rows.batch_size, D, W - 1 + rows.S - 1))
            self._conv_scratch = static(x.new_zeros(rows.batch_size, D, W - 1))
        assert self._conv_scratch is not None
        if rows.phase is Phase.PREFILL:
            assert rows.places is not None
            y, recent = causal_conv1d(x, weight, bias, activation=activation)
            self._conv[:, :, : W - 1].index_copy_(0, rows.places[0], recent)
            return y
        if rows.phase is Phase.VERIFY:
            accepted = rows.accepted
            return causal_conv1d_(
                x, weight, bias, self._conv, None, accepted, activation=activation
            )
        if rows.phase is Phase.BRANCH:
            first = (rows.accepted - 1).clamp(min=0).long()
            columns = first[:, None] + torch.arange(W - 1, device=x.device)
            recent = self._conv.gather(2, columns[:, None].expand(-1, D, -1))
            self._conv_scratch.copy_(recent)
        return causal_conv1d_(x, weight, bias, self._conv_scratch, activation=activation)


class AttentionLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not checked
    """Keys and values of every row; a rejected token's are written over by the next step."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self._rows = rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def buffer(x: Tensor) -> Tensor:
            shape = (self._rows.batch_size, x.shape[1], self._rows.length, x.shape[3])
            return static(x.new_zeros(shape))

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._rows.places is not None
        which, positions = self._rows.places
        places = (which[:, None], positions)
        self.keys.transpose(1, 2).index_put_(places, key_states.transpose(1, 2))
        self.values.transpose(1, 2).index_put_(places, value_states.transpose(1, 2))
        if self._rows.phase is Phase.PREFILL:
            return key_states, value_states  # nothing comes before a prompt
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._rows.length


class RowCache(Cache):  # type: ignore[misc]  # transformers is not checked
    """A cache of a model of transformers, made for its layers of attention and recurrence."""

    def __init__(self, config: Any, rows: Rows, state_dtype: torch.dtype, exact: bool) -> None:
        kinds = (
            getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        )
        layers: list[LendingLayer | AttentionLayer] = []
        for kind in kinds:
            if kind == "linear_attention" and getattr(config, "number_of_conv_states", 1) == 1:
                layers.append(LendingLayer(RowStates(rows, state_dtype, exact)))
            elif kind == "full_attention":
                layers.append(AttentionLayer(rows))
            else:
                raise NotImplementedError(
                    "SpeculativeDecoder: model must have layers of full attention and of linear "
                    f"attention with one convolution, got {kind} in {type(config).__name__}"
                )
        super().__init__(layers=layers)
