"""Calling recurrent.c: ``recurrent``, ``chunk``, ``recurrent_`` and ``chunk_`` on a CPU.

``chunk`` is the same function, and on a CPU no faster as matrix products: see recurrent_tile.h.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .call import DTYPES, CallPlan, allocator, refusal, set_states

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
        is_functional = _ARGUMENTS[name] is _FUNCTIONAL
        new = ("o", "state") if is_functional else ("o",)
        same = {} if is_functional else {"initial_state": "state"}
        super().__init__("recurrent", tensors, keywords, new, same)
        call = self._call
        call.is_functional = is_functional
        call.has_tiles = name in ("chunk", "chunk_")
        set_states(call, tensors)
        # A token of no sequence, or of padding, is not written.
        is_whole = tensors.get("cu_seqlens") is None and tensors.get("state_indices") is None
        shape, dtype = (call.B, call.T, call.HV, call.V), DTYPES[call.token_type]
        self._new_o = allocator(shape, dtype, is_whole and call.null_index < 0)
        shape, dtype = (call.N, call.HV, call.V, call.K), DTYPES[call.state_type]
        self._new_states = allocator(shape, dtype) if is_functional else None

    def __call__(self, tensors: Sequence[Tensor], pointers: Sequence[int]) -> Any:
        """The outputs; None where a slot is outside the pool, and nothing was written."""
        o = self._new_o()
        if self._new_states is None:
            is_outside = self.run((*pointers, o.data_ptr())) == _SLOT_OUTSIDE
            return None if is_outside else o
        final_state = self._new_states()
        self.run((*pointers, o.data_ptr(), final_state.data_ptr()))
        return o, final_state
