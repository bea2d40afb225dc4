"""Argument checks that raise the house error, before anything is launched or written.

    <op>: <argument> must <rule>, got <value>

They look at shapes, dtypes, devices and strides only, so that they hold for fake tensors too: a
comparison that a symbolic size cannot decide is left to the eager call.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_K = 256


class Sizes(NamedTuple):
    """Sizes of one call; see README.md beside this file. With symbolic shapes some are SymInts."""

    B: int
    T: int
    N: int
    H: int
    HV: int
    K: int
    V: int


def holds(condition: Any) -> bool:
    """Whether a comparison of sizes holds; False where a symbolic size leaves it open."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, and float64 for float64 inputs (for checks against an exact result)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _numbers(values: Any) -> str:
    return "[" + ", ".join(str(value) for value in values) + "]"


def check_shape(op: str, name: str, x: Tensor, symbols: str, sizes: tuple[Any, ...]) -> None:
    """``symbols`` spells the shape, such as ``"[B, T, HV]"``; ``sizes`` are its values."""
    if len(x.shape) != len(sizes) or any(map(holds, map(operator.ne, x.shape, sizes))):
        raise ValueError(
            f"{op}: {name} must have shape {symbols} = {_numbers(sizes)}, got {_numbers(x.shape)}"
        )


def check_rank(op: str, name: str, x: Tensor, symbols: str) -> None:
    rank = symbols.count(",") + 1
    if len(x.shape) != rank:
        raise ValueError(
            f"{op}: {name} must have {rank} dimensions {symbols}, got {_numbers(x.shape)}"
        )


def check_not_empty(op: str, name: str, x: Tensor, symbols: str) -> None:
    for i, size in enumerate(x.shape):
        if holds(size == 0):
            symbol = symbols.strip("[]").split(", ")[i]
            raise ValueError(f"{op}: {name} must have {symbol} >= 1, got {_numbers(x.shape)}")


def check_dtype(op: str, name: str, x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(allowed))
        got = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: {name} must have dtype {names}, got {got}")


def check_devices(op: str, first: str, tensors: dict[str, Tensor | None]) -> None:
    present = [x.device for x in tensors.values() if x is not None]
    device = present[0]
    if present.count(device) == len(present):
        return
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first}, {device}, got {x.device}"
            )


def check_index(op: str, name: str, x: Tensor | None, symbols: str, sizes: tuple[Any, ...]) -> None:
    if x is not None:
        check_dtype(op, name, x, INDEX_DTYPES)
        check_shape(op, name, x, symbols, sizes)


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes that a state may have beside inputs of ``dtype``."""
    reduced = (torch.float32, torch.bfloat16, torch.float16)
    return (torch.float64, *reduced) if dtype == torch.float64 else reduced


def check_packing(op: str, x: Tensor, cu_seqlens: Tensor | None, name: str) -> int:
    """The number of sequences ``N`` in ``x [B, T, ...]``."""
    if cu_seqlens is None:
        return x.shape[0]
    check_dtype(op, "cu_seqlens", cu_seqlens, INDEX_DTYPES)
    check_rank(op, "cu_seqlens", cu_seqlens, "[N + 1]")
    if holds(cu_seqlens.shape[0] < 2):
        raise ValueError(
            f"{op}: cu_seqlens must have shape [N + 1] with N >= 1, "
            f"got {_numbers(cu_seqlens.shape)}"
        )
    if holds(x.shape[0] != 1):
        raise ValueError(
            f"{op}: {name} must have B = 1 when cu_seqlens is given, got B = {x.shape[0]}"
        )
    return cu_seqlens.shape[0] - 1


def check_qkv(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Sizes:
    """Check the arguments that every gated delta rule operator has.

    Raises:
        ValueError: a shape, dtype or device breaks the table in ``gdn_ops/README.md``.
        NotImplementedError: ``K`` is greater than 256.
    """
    check_rank(op, "q", q, "[B, T, H, K]")
    check_not_empty(op, "q", q, "[B, T, H, K]")
    B, T, H, K = q.shape
    check_shape(op, "k", k, "[B, T, H, K]", (B, T, H, K))
    check_rank(op, "v", v, "[B, T, HV, V]")
    HV, V = v.shape[2:]
    check_shape(op, "v", v, "[B, T, HV, V]", (B, T, HV, V))
    check_not_empty(op, "v", v, "[B, T, HV, V]")
    if holds(HV % H != 0):
        raise ValueError(f"{op}: v must have HV a multiple of H = {H}, got HV = {HV}")
    if holds(K > MAX_K):
        raise NotImplementedError(f"{op}: K must be at most {MAX_K}, got {K}")
    check_dtype(op, "q", q, INPUT_DTYPES)
    check_dtype(op, "k", k, (q.dtype,))
    check_dtype(op, "v", v, (q.dtype,))
    exact = arithmetic_dtype(q.dtype)
    if g is not None:
        if len(g.shape) == 4:
            check_shape(op, "g", g, "[B, T, HV, K]", (B, T, HV, K))
        else:
            check_shape(op, "g", g, "[B, T, HV]", (B, T, HV))
        check_dtype(op, "g", g, (exact,))
    if beta is not None:
        check_shape(op, "beta", beta, "[B, T, HV]", (B, T, HV))
        check_dtype(op, "beta", beta, (torch.float32, q.dtype))
    N = check_packing(op, q, cu_seqlens, "q")
    named = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "cu_seqlens": cu_seqlens}
    check_devices(op, "q", named)
    return Sizes(B, T, N, H, HV, K, V)


def check_initial_state(op: str, initial_state: Tensor | None, q: Tensor, sizes: Sizes) -> None:
    if initial_state is None:
        return
    _, _, N, _, HV, K, V = sizes
    check_shape(op, "initial_state", initial_state, "[N, HV, V, K]", (N, HV, V, K))
    check_dtype(op, "initial_state", initial_state, state_dtypes(q.dtype))
    check_devices(op, "q", {"q": q, "initial_state": initial_state})


def check_pool(
    op: str,
    state: Tensor,
    x: Tensor,
    name: str,
    symbols: str,
    sizes: tuple[Any, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Check a pool ``[slots, ...]``; ``sizes`` are those after the first."""
    check_rank(op, "state", state, symbols)
    check_shape(op, "state", state, symbols, (state.shape[0], *sizes))
    check_not_empty(op, "state", state, symbols)
    check_dtype(op, "state", state, dtypes)
    check_devices(op, name, {name: x, "state": state})


def check_matrix_rows(op: str, state: Tensor) -> None:
    """``[V, K]`` of a pool must be contiguous; slot and head strides are free."""
    V, K = state.shape[2:]
    if holds(state.stride(3) != 1) or holds(state.stride(2) != K):
        raise ValueError(
            f"{op}: state must have a contiguous [V, K] = [{V}, {K}], "
            f"got strides {_numbers(state.stride()[2:])}"
        )


def check_slots(
    op: str,
    state: Tensor,
    state_indices: Tensor | None,
    N: int,
    extra: dict[str, Tensor | None],
) -> None:
    """Check slot arguments ``[N]`` (or a table ``[N, S]``, if the caller let it pass) of a pool."""
    if state_indices is None:
        if holds(state.shape[0] < N):
            raise ValueError(
                f"{op}: state must have a slot for each of N = {N} sequences when state_indices "
                f"is None, got {state.shape[0]} slots"
            )
    elif len(state_indices.shape) == 2:
        check_index(op, "state_indices", state_indices, "[N, S]", (N, state_indices.shape[1]))
        check_not_empty(op, "state_indices", state_indices, "[N, S]")
    else:
        check_index(op, "state_indices", state_indices, "[N]", (N,))
    for name, x in extra.items():
        if name == "has_initial_state" and x is not None:
            check_dtype(op, name, x, (torch.bool,))
            check_shape(op, name, x, "[N]", (N,))
        else:
            check_index(op, name, x, "[N]", (N,))
    check_devices(op, "state", {"state": state, "state_indices": state_indices, **extra})


def check_null_index(op: str, null_index: int) -> None:
    if null_index < -1:
        raise ValueError(f"{op}: null_index must be at least -1, got {null_index}")
