"""Calling recurrent.c: ``recurrent``, ``chunk``, ``recurrent_`` and ``chunk_`` on a CPU.

``chunk`` is the same function, and on a CPU no faster as matrix products: see recurrent_tile.h.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .build import load, structure

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TYPES = {dtype: i for i, dtype in enumerate(_DTYPES)}
# Numbers of the states that are worth a thread: what one updates in some 5 us.
_NUMBERS_PER_THREAD = 1 << 15
_SLOT_OUTSIDE, NO_MEMORY = 1, 2

Call = structure("recurrent_call", "Call")
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


def refusal(source: str, tensors: dict[str, Any]) -> str | None:
    """Why the C of ``source`` serves no such call; None where it does."""
    if tensors["q"].dtype == torch.float64:
        return "the C kernel computes in float32; q is float64"
    initial_state = tensors.get("initial_state")
    if initial_state is not None and not initial_state[0, 0].is_contiguous():
        return "the C kernel needs matrices of initial_state that are contiguous"
    library = load(source)
    return library if isinstance(library, str) else None


class Plan:
    """All of a call but its addresses: calls of one key (``_plans.py``) have one plan."""

    def __init__(self, name: str, args: Sequence[Tensor | None], keywords: dict[str, Any]) -> None:
        """Of a checked call, which ``supports`` serves."""
        tensors = dict(zip(_ARGUMENTS[name], args, strict=False))
        self._names = [key for key, x in tensors.items() if x is not None]
        self._call = call = new_call(tensors, keywords)
        call.is_functional = _ARGUMENTS[name] is _FUNCTIONAL
        call.has_tiles = name in ("chunk", "chunk_")
        set_states(call, tensors)
        self._o: Any = ((call.B, call.T, call.HV, call.V), _DTYPES[call.token_type])
        self._states: Any = ((call.N, call.HV, call.V, call.K), _DTYPES[call.state_type])
        # A token of no sequence, or of padding, is not written.
        is_whole = tensors.get("cu_seqlens") is None and tensors.get("state_indices") is None
        self._empty = torch.empty if is_whole and call.null_index < 0 else torch.zeros
        self._most_threads = most_threads(call)
        self._function = load("recurrent").gdn_recurrent  # type: ignore[union-attr]

    def __call__(self, tensors: Sequence[Tensor], pointers: Sequence[int]) -> Any:
        """The outputs; None where a slot is outside the pool, and nothing was written."""
        call = Call.from_buffer_copy(self._call)  # calls of other threads have their own
        for name, pointer in zip(self._names, pointers, strict=True):
            setattr(call, name, pointer)
        shape, dtype = self._o
        o = self._empty(shape, dtype=dtype)
        call.o = o.data_ptr()
        if call.is_functional:
            shape, dtype = self._states
            final_state = torch.empty(shape, dtype=dtype)
            call.state = final_state.data_ptr()
        else:
            call.initial_state = call.state
        call.threads = min(self._most_threads, torch.get_num_threads())
        error = self._function(ctypes.byref(call))
        if error == NO_MEMORY:
            raise MemoryError("recurrent: no memory for keys and queries in float32")
        if error == _SLOT_OUTSIDE:
            return None
        return (o, final_state) if call.is_functional else o


def most_threads(call: Any) -> int:
    """That are worth starting."""
    numbers = call.B * call.T * call.HV * call.V * call.K
    return max(1, int(numbers // _NUMBERS_PER_THREAD))


def new_call(tensors: dict[str, Any], keywords: dict[str, Any]) -> Any:
    """The structure without addresses, and what is of states."""
    q, v, g, beta = tensors["q"], tensors["v"], tensors.get("g"), tensors.get("beta")
    bounds, scale = tensors.get("cu_seqlens"), keywords.get("scale")
    call = Call(null_index=keywords.get("null_index", -1))
    call.B, call.T, call.H, call.K = q.shape
    call.HV, call.V = v.shape[2:]
    call.N = call.B if bounds is None else bounds.shape[0] - 1
    call.scale = call.K**-0.5 if scale is None else scale
    call.use_qk_l2norm = keywords.get("use_qk_l2norm", False)
    call.by_channel = g is not None and g.dim() == 4
    call.token_type = _TYPES[q.dtype]
    call.beta_type = 0 if beta is None else _TYPES[beta.dtype]
    for key, axes in {"q": "bthk", "k": "bthk", "v": "bthv", "g": "bthk", "beta": "bth"}.items():
        set_strides(call, key, tensors.get(key), axes)
    _set_integers(call, tensors)
    return call


def set_strides(call: Any, name: str, x: Tensor | None, axes: str) -> None:
    """Of a tensor, where there is one."""
    if x is not None:
        for axis, stride in zip(axes, x.stride(), strict=False):
            setattr(call, f"{name}_{axis}", stride)


def set_states(call: Any, tensors: dict[str, Any]) -> None:
    """Strides and dtype of the states that are read and written."""
    read: Any = tensors.get("initial_state") if call.is_functional else tensors["state"]
    set_strides(call, "initial_state", read, "nh")
    if call.is_functional:
        call.state_h = call.V * call.K
        call.state_n = call.HV * call.state_h
        call.slots = call.N
    else:
        set_strides(call, "state", read, "nh")
        call.slots = read.shape[0]
    call.state_type = 0 if read is None else _TYPES[read.dtype]


def _set_integers(call: Any, tensors: dict[str, Any]) -> None:
    has = tensors.get("has_initial_state")
    set_strides(call, "has_initial_state", has, "n")
    names = {
        "state_indices": "indices",
        "num_accepted_tokens": "accepted",
        "cu_seqlens": "cu_seqlens",
        "read_indices": "read",
    }
    for key, short in names.items():
        x = tensors.get(key)
        if x is None:
            continue
        setattr(call, f"{short}_n", x.stride(0))
        setattr(call, f"wide_{short}", x.dtype == torch.int64)
        if x.dim() == 2:
            call.columns, call.indices_s = x.shape[1], x.stride(1)
