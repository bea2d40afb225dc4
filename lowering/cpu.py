"""Decode on a CPU: one token of ``recurrent_``, ``recurrent`` and ``causal_conv1d_`` inlined.

An opaque call of an operator costs Python, and one token is pointwise work and sums, for which
Inductor writes C++: so these rules hand it the formula, made of Inductor's own lowerings of
``torch.ops.aten``. For large states the two that update them stay calls of gdn_ops/cpu/recurrent.c,
which goes through a state once; where there is no compiler for it they are inlined at every size.

Inlined against the call in C, us (one thread of an AMD EPYC with AVX2, torch 2.13, 2026-11-30), at
(B, H, HV, K, V): (1, 2, 4, 32, 64) 72 / 117, (1, 16, 32, 128, 128) 325 / 216, with B = 16 4300 /
3100, and with new states 71 / 135, 330 / 261, 26500 / 8700. ``causal_conv1d_`` is inlined at every
size: 46 instead of 339 us, 105 instead of 494, 0.9 instead of 1.6 ms (2026-11-24).

Everything else stays an opaque call:

- more than one token, packed rows: the operator keeps rows of a state in the cache for all of them;
- ``exact=True``: Inductor chooses the order of a sum, and whether products are contracted;
- slots by index: a padding row must not write, and the C++ that Inductor writes for a scatter has
  no masked store; and a slot outside the pool would end the process instead of raising.
"""

import functools
from typing import Any

import torch

from gdn_ops._checks import arithmetic_dtype
from gdn_ops.cpu.build import load

from . import _inductor
from ._inductor import IRNode, Unsupported

aten = torch.ops.aten

_mul = functools.partial(_inductor.lowered, aten.mul.Tensor)
_add = functools.partial(_inductor.lowered, aten.add.Tensor)
_sub = functools.partial(_inductor.lowered, aten.sub.Tensor)
_view = functools.partial(_inductor.lowered, aten.view.default)
_cast = functools.partial(_inductor.lowered, torch.ops.prims.convert_element_type.default)
_narrow = functools.partial(_inductor.lowered, aten.slice.Tensor)
_write = functools.partial(_inductor.lowered, aten.copy_.default)


def _sum(x: IRNode) -> IRNode:
    """Over the last dimension, which stays as one of size 1."""
    total: IRNode = _inductor.lowered(aten.sum.dim_IntList, x, [-1], True)
    return total


def _once(x: IRNode) -> IRNode:
    """``x`` in memory: computed once, not by each reader, and from the state as it is now."""
    x.realize()
    return x


def _supports(
    x: IRNode, opaque: dict[str, IRNode | None], state: IRNode | None, null_index: int
) -> None:
    """Raise for a call that stays opaque.

    Args:
        x: The first tensor of the call, ``[B, T, ...]``.
        opaque: Arguments that no rule here serves.
        state: The pool, where there is one.
        null_index: Slots up to this one are no slots.

    Raises:
        Unsupported: with the reason.
    """
    B, T = x.get_size()[:2]
    if not _inductor.is_known(T == 1):
        raise Unsupported("on a CPU only T = 1 is inlined")
    given = [name for name, node in opaque.items() if node is not None]
    if given:
        raise Unsupported(f"on a CPU no call with {', '.join(given)} is inlined")
    if null_index >= 0:
        raise Unsupported("on a CPU no call with padding rows is inlined")
    if state is not None and not _inductor.is_known(state.get_size()[0] >= B):
        raise Unsupported("whether the pool has B slots is not known before the call")


# Numbers of the states up to which a step is inlined: a call takes 35 us in a compiled model, and
# saves 0.3 us for each thousand.
_MOST_INLINED = 1 << 17


def _leave_to_c(q: IRNode, v: IRNode) -> None:
    """Raise for a step that is faster in C.

    Raises:
        Unsupported: the states are large, or may be.
    """
    if _inductor.is_packaged() or isinstance(load("recurrent"), str):
        return
    numbers = q.get_size()[0] * q.get_size()[3] * v.get_size()[2] * v.get_size()[3]
    if not _inductor.is_known(numbers <= _MOST_INLINED):
        raise Unsupported("its states are large, for which the call in C is faster")


def _refuse_mixed(*tensors: IRNode | None) -> None:
    """Raise for two 16-bit dtypes in one call: Inductor's C++ warns of such a loop.

    Raises:
        Unsupported: bfloat16 and float16 are mixed.
    """
    if {torch.bfloat16, torch.float16} <= {x.get_dtype() for x in tensors if x is not None}:
        raise Unsupported("on a CPU no call that mixes bfloat16 and float16 is inlined")


def _normalised(x: IRNode) -> IRNode:
    squares = _sum(_mul(x, x))
    y: IRNode = _mul(x, _inductor.lowered(aten.rsqrt.default, _add(squares, 1e-6)))
    return y


def _delta_step(
    q: IRNode,
    k: IRNode,
    v: IRNode,
    g: IRNode | None,
    beta: IRNode | None,
    state: IRNode | None,
    scale: float | None,
    use_qk_l2norm: bool,
) -> tuple[IRNode, IRNode]:
    """``o [B, 1, HV, V]`` and the states after it, ``[B, H, R, V, K]`` in the arithmetic dtype.

    Everything has the dimensions ``[B, H, R, V, K]``, of size 1 where a tensor does not have them.
    Both sums and the write then have the loops ``B H R V`` in common, which Inductor merges: a row
    of a state is in the first cache when it is read again. ``S q + u <k, q>``, as in
    gdn_ops/recurrent.py, would need a loop over rows of its own, and nothing would be merged.
    """
    B = q.get_size()[0]
    H, K, HV, V = (_inductor.static_int(x) for x in (*q.get_size()[2:], *v.get_size()[2:]))
    R, dtype = HV // H, arithmetic_dtype(q.get_dtype())
    q, k = (_cast(_view(x, [B, H, 1, 1, K]), dtype) for x in (q, k))
    if use_qk_l2norm:
        q, k = _normalised(q), _normalised(k)
    q, k = _once(_mul(q, K**-0.5 if scale is None else scale)), _once(k)
    u = _cast(_view(v, [B, H, R, V, 1]), dtype)
    if state is not None:
        S = _cast(_view(state, [B, H, R, V, K]), dtype)
        if g is not None:
            decay = _inductor.lowered(aten.exp.default, _cast(g, dtype))
            S = _mul(S, _view(_once(decay), [B, H, R, 1, g.get_numel() // (B * HV)]))
        u = _sub(u, _sum(_mul(S, k)))
    if beta is not None:
        u = _mul(u, _cast(_view(beta, [B, H, R, 1, 1]), dtype))
    written = _mul(u, k)
    if state is not None:
        written = _add(written, S)
    o = _sum(_mul(written, q))
    return _view(_once(_cast(o, v.get_dtype())), [B, 1, HV, V]), written


def lower_recurrent(
    q: IRNode,
    k: IRNode,
    v: IRNode,
    g: IRNode | None = None,
    beta: IRNode | None = None,
    initial_state: IRNode | None = None,
    cu_seqlens: IRNode | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> Any:
    """``gdn::recurrent``."""
    _supports(q, {"cu_seqlens": cu_seqlens}, None, -1)
    _leave_to_c(q, v)
    _refuse_mixed(q, initial_state)
    o, written = _delta_step(q, k, v, g, beta, initial_state, scale, use_qk_l2norm)
    dtype = torch.float32 if initial_state is None else initial_state.get_dtype()
    B, H, R, V, K = written.get_size()
    return o, _view(_cast(written, dtype), [B, H * R, V, K])


def lower_recurrent_(
    q: IRNode,
    k: IRNode,
    v: IRNode,
    g: IRNode | None,
    beta: IRNode | None,
    state: IRNode,
    state_indices: IRNode | None = None,
    num_accepted_tokens: IRNode | None = None,
    cu_seqlens: IRNode | None = None,
    read_indices: IRNode | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    null_index: int = -1,
    exact: bool = False,
) -> Any:
    """``gdn::recurrent_``."""
    if exact:
        raise Unsupported("on a CPU no call with exact=True is inlined")
    opaque = {"state_indices": state_indices, "num_accepted_tokens": num_accepted_tokens}
    opaque |= {"cu_seqlens": cu_seqlens, "read_indices": read_indices}
    _supports(q, opaque, state, null_index)
    _leave_to_c(q, v)
    _refuse_mixed(q, state)
    rows = _narrow(state, 0, 0, q.get_size()[0])
    o, written = _delta_step(q, k, v, g, beta, rows, scale, use_qk_l2norm)
    # Last, since after it the call can no longer be left to the eager operator.
    _write(_view(rows, written.get_size()), written)
    return o


def lower_causal_conv1d_(
    x: IRNode,
    weight: IRNode,
    bias: IRNode | None,
    state: IRNode,
    state_indices: IRNode | None = None,
    num_accepted_tokens: IRNode | None = None,
    cu_seqlens: IRNode | None = None,
    *,
    activation: str | None = None,
    null_index: int = -1,
) -> Any:
    """``gdn::causal_conv1d_``."""
    opaque = {"state_indices": state_indices, "num_accepted_tokens": num_accepted_tokens}
    _supports(x, opaque | {"cu_seqlens": cu_seqlens}, state, null_index)
    _refuse_mixed(x, state)
    B, _, D = x.get_size()
    W, dtype = _inductor.static_int(weight.get_size()[1]), arithmetic_dtype(x.get_dtype())
    columns = _narrow(_narrow(state, 0, 0, B), 2, 0, W - 1)
    newest = _view(x, [B, D, 1])
    y = _mul(_cast(newest, dtype), _cast(_narrow(weight, 1, W - 1, W), dtype))
    for j in reversed(range(W - 1)):
        taps = _cast(_narrow(weight, 1, j, j + 1), dtype)
        y = _add(y, _mul(_cast(_narrow(columns, 2, j, j + 1), dtype), taps))
    y = y if bias is None else _add(y, _cast(_view(bias, [D, 1]), dtype))
    if activation == "silu":
        y = _mul(y, _inductor.lowered(aten.sigmoid.default, y))
    recent = [_narrow(columns, 2, 1, W - 1), _cast(newest, state.get_dtype())]
    # In memory first: a column is written where the one after it was read.
    shifted = _once(_inductor.lowered(aten.cat.default, recent[W == 2 :], 2))
    y = _view(_once(_cast(y, x.get_dtype())), [B, 1, D])
    # Last, since after it the call can no longer be left to the eager operator.
    _write(columns, shifted)
    return y
