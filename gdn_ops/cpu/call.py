"""A call in C: its structure, and a plan of it."""

import ctypes
import functools
import operator
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gdn_ops._allocate import Allocator

from .build import load, structure

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TYPES = {dtype: i for i, dtype in enumerate(DTYPES)}
# Numbers of the states that are worth a thread: what one updates in some 5 us.
_NUMBERS_PER_THREAD = 1 << 15
_NO_MEMORY = 2
_ALLOCATOR = Allocator(torch.device("cpu"))

Call = structure("recurrent_call", "Call")
_ADDRESSES = [name for name, kind in Call._fields_ if kind is ctypes.c_void_p]
_pack = struct.Struct(f"{len(_ADDRESSES)}P").pack


def refusal(source: str, tensors: dict[str, Any]) -> str | None:
    """Why the C of ``source`` serves no such call; None where it does."""
    if tensors["q"].dtype == torch.float64:
        return "the C kernel computes in float32; q is float64"
    initial_state = tensors.get("initial_state")
    if initial_state is not None and not _has_contiguous_matrices(initial_state):
        return "the C kernel needs matrices of initial_state that are contiguous"
    library = load(source)
    return library if isinstance(library, str) else None


def _has_contiguous_matrices(x: Tensor) -> bool:
    """Of ``[N, HV, V, K]``; True of what is no such tensor, which the checks refuse."""
    return x.dim() != 4 or x.numel() == 0 or x[0, 0].is_contiguous()


class CallPlan:
    """All of a call but its addresses: calls of one key (``_plans.py``) have one plan."""

    def __init__(
        self,
        source: str,
        tensors: dict[str, Any],
        keywords: dict[str, Any],
        new: Sequence[str],
        same: Mapping[str, str],
    ) -> None:
        """Of a checked call of ``<source>.c``, with its tensors by the names of the structure.

        Args:
            source: Name of the C file.
            tensors: The tensors of the call, and None for those that are absent.
            keywords: Its options.
            new: What it writes beside them.
            same: For a name of the structure another, which has its address.
        """
        self._call = new_call(tensors, keywords)
        numbers = self._call.B * self._call.T * self._call.HV * self._call.V * self._call.K
        self._most_threads = max(1, numbers // _NUMBERS_PER_THREAD)
        self._source = source
        self._function = getattr(load(source), f"gdn_{source}")
        self._function.argtypes = [ctypes.c_char_p]
        names = [*(key for key, x in tensors.items() if x is not None), *new]
        places = {name: i for i, name in enumerate(names)}
        # The last address is the one of what is absent.
        self._arrange = operator.itemgetter(
            *(places.get(same.get(name, name), -1) for name in _ADDRESSES)
        )
        self._numbers: dict[int, bytes] = {}

    def run(self, addresses: Sequence[int]) -> int:
        """What the C returns, of a call with these addresses of its tensors and of ``new``.

        Raises:
            MemoryError: a thread had none.
        """
        threads = min(self._most_threads, torch.get_num_threads())
        numbers = self._numbers.get(threads)
        if numbers is None:
            self._call.threads = threads
            numbers = self._numbers[threads] = bytes(self._call)[Call.B.offset :]
        result = int(self._function(_pack(*self._arrange((*addresses, 0))) + numbers))
        if result == _NO_MEMORY:
            raise MemoryError(f"{self._source}: no memory for keys and queries in float32")
        return result


def allocator(
    shape: tuple[int, ...], dtype: torch.dtype, is_whole: bool = True
) -> Callable[[], Tensor]:
    """Makes contiguous tensors for a call that writes them whole, else zeros."""
    if not is_whole:
        return functools.partial(torch.zeros, shape, dtype=dtype)
    stride = torch.empty(shape, device="meta").stride()
    return lambda: _ALLOCATOR.find()(shape, stride, dtype)


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
