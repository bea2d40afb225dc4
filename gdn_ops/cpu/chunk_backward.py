"""Calling chunk_backward.c: the gradients of ``chunk`` and ``recurrent`` on a CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .call import CallPlan, allocator, refusal, set_states, set_strides

_ARGUMENTS = (
    *("d_o", "dfinal_state", "q", "k", "v", "g", "beta"),
    *("initial_state", "cu_seqlens"),
)
_GRADIENTS = {name: f"d{name}" for name in ("q", "k", "v", "g", "beta", "initial_state")}


def supports(name: str, args: Sequence[Tensor | None], keywords: dict[str, Any]) -> str | None:
    """Why a call cannot be served, in words for its caller; None where it can."""
    tensors: dict[str, Any] = dict(zip(_ARGUMENTS, args, strict=False))
    q, initial_state = tensors["q"], tensors.get("initial_state")
    state = torch.float32 if initial_state is None else initial_state.dtype
    for x, dtype in ((tensors["d_o"], q.dtype), (tensors["dfinal_state"], state)):
        if x is not None and x.dtype != dtype:
            return f"the C kernel needs gradients in the dtype of the outputs; one is {x.dtype}"
    return refusal("chunk_backward", tensors)


class Plan(CallPlan):
    """Of a call that ``supports`` serves."""

    def __init__(self, name: str, args: Sequence[Tensor | None], keywords: dict[str, Any]) -> None:
        tensors = dict(zip(_ARGUMENTS, args, strict=False))
        super().__init__("chunk_backward", tensors, keywords, [*_GRADIENTS.values()], {})
        call = self._call
        call.is_functional = True
        set_states(call, tensors)
        set_strides(call, "do", tensors["d_o"], "bthv")
        set_strides(call, "dfinal", tensors["dfinal_state"], "nhvk")
        q: Any = tensors["q"]
        inputs = (tensors.get(key) for key in _GRADIENTS)
        # Tokens of no sequence are not written.
        is_whole = tensors.get("cu_seqlens") is None
        self._new = [
            allocator((0,), q.dtype) if x is None else allocator(tuple(x.shape), x.dtype, is_whole)
            for x in inputs
        ]
        self._most_threads = min(self._most_threads, call.N * call.H)

    def __call__(self, tensors: Sequence[Tensor], pointers: Sequence[int]) -> Any:
        """The gradients; an empty tensor, without an address, for that of an input that is None."""
        gradients = tuple([new() for new in self._new])
        self.run((*pointers, *[x.data_ptr() for x in gradients]))
        return gradients
