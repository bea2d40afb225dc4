"""Calling recurrent.c: ``recurrent``, ``chunk``, ``recurrent_`` and ``chunk_`` on a CPU.

``chunk`` is the same function, and on a CPU no faster as matrix products: see recurrent_tile.h.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .call import DTYPES, CallPlan, refusal, set_states

_SLOT_OUTSIDE = 1

_FUNCTIONAL = ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens")
_ON_A_POOL = ("q", "k", "v", "g", "beta", "state", "state_indices")
_ARGUMENTS = {
    "recurrent": _FUNCTIONAL,
    "chunk": _FUNCTIONAL,
    "recurrent_": (*_ON_A_POOL, "num_accepted_tokens", "cu_seqlens", "read_indices"),
    "chunk_": (*_ON_A_POOL, "has_initial_state", "cu_seqlens", "read_indices"),
}


def supports(name: str, args: Sequence[Tensor | None], keywords: dict[str, Any]) -> str | None:
    """Why a call cannot be served, in words for its caller; None where it can."""
    if keywords.get("exact"):
        return "the C kernel has no exact=True"
    return refusal("recurrent", dict(zip(_ARGUMENTS[name], args, strict=False)))


class Plan(CallPlan):
    """Of a call that ``supports`` serves."""

    def __init__(self, name: str, args: Sequence[Tensor | None], keywords: dict[str, Any]) -> None:
        tensors = dict(zip(_ARGUMENTS[name], args, strict=False))
        super().__init__("recurrent", tensors, keywords)
        call = self._call
        call.is_functional = _ARGUMENTS[name] is _FUNCTIONAL
        call.has_tiles = name in ("chunk", "chunk_")
        set_states(call, tensors)
        self._o: Any = ((call.B, call.T, call.HV, call.V), DTYPES[call.token_type])
        self._states: Any = ((call.N, call.HV, call.V, call.K), DTYPES[call.state_type])
        # A token of no sequence, or of padding, is not written.
        is_whole = tensors.get("cu_seqlens") is None and tensors.get("state_indices") is None
        self._empty = torch.empty if is_whole and call.null_index < 0 else torch.zeros

    def __call__(self, tensors: Sequence[Tensor], pointers: Sequence[int]) -> Any:
        """The outputs; None where a slot is outside the pool, and nothing was written."""
        call = self.begin(pointers)
        shape, dtype = self._o
        o = self._empty(shape, dtype=dtype)
        call.o = o.data_ptr()
        if call.is_functional:
            shape, dtype = self._states
            final_state = torch.empty(shape, dtype=dtype)
            call.state = final_state.data_ptr()
        else:
            call.initial_state = call.state
        if self.run(call) == _SLOT_OUTSIDE:
            return None
        return (o, final_state) if call.is_functional else o
