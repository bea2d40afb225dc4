"""The functional operators, ``chunk`` and ``recurrent``: one schema, two scans."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import Sizes, arithmetic_dtype, check_initial_state, check_qkv
from ._library import register_operator
from ._recurrence import StartScan, Tokens, initial_states, state_blocks
from ._sequences import Block, Bounds, as_index, new_output, store_states
from ._slots import check_bounds

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? g=None, Tensor? beta=None, Tensor? initial_state=None, "
    "Tensor? cu_seqlens=None, *, float? scale=None, bool use_qk_l2norm=False) "
    "-> (Tensor o, Tensor final_state)"
)


def register_functional(
    name: str, start: StartScan, kernels: str | None = None, cpu: str | None = None
) -> None:
    """Define ``torch.ops.gdn.<name>`` by the scan that computes it, and by its kernels."""
    register_operator(
        name + _SCHEMA, _reference(name, start), _fake(name), kernels, _check_data(name), cpu=cpu
    )


def _check_data(name: str) -> Callable[..., None]:
    def check_data(q: Tensor, *others: Any, **_: Any) -> None:
        check_bounds(name, others[5] if len(others) > 5 else None, q.shape[1])

    return check_data


def _new_final_state(initial_state: Tensor | None, q: Tensor, sizes: Sizes) -> Tensor:
    dtype = arithmetic_dtype(q.dtype) if initial_state is None else initial_state.dtype
    return q.new_empty((sizes.N, sizes.HV, sizes.V, sizes.K), dtype=dtype)


def _first_states(
    initial_state: Tensor | None, final: Tensor, block: Block, tokens: Tokens, sizes: Sizes
) -> Tensor:
    """The states that a block starts from, in the memory of its final states where these serve."""
    index = as_index(block.ids, final.device)
    if final.dtype != tokens.dtype or not isinstance(index, slice):
        return initial_states(initial_state, block, tokens, sizes)
    S = final[index]
    return S.zero_() if initial_state is None else S.copy_(initial_state[index])


def _reference(name: str, start: StartScan) -> Callable[..., tuple[Tensor, Tensor]]:
    def reference(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        scale: float | None = None,
        use_qk_l2norm: bool = False,
    ) -> tuple[Tensor, Tensor]:
        sizes = check_qkv(name, q, k, v, g, beta, cu_seqlens)
        check_initial_state(name, initial_state, q, sizes)
        check_bounds(name, cu_seqlens, sizes.T)
        tokens = Tokens.of(q, k, v, g, beta, scale, use_qk_l2norm)
        bounds = Bounds.of(q, cu_seqlens)
        o = new_output(v, bounds, range(bounds.count))
        final = _new_final_state(initial_state, q, sizes)
        for n in (n for n, length in enumerate(bounds.lengths) if length == 0):
            final[n] = 0 if initial_state is None else initial_state[n]
        scan = start(tokens, o)
        for block in state_blocks(tokens, bounds):
            S = _first_states(initial_state, final, block, tokens, sizes)
            store_states(final, block.ids, scan(block, S, None))
        return o, final

    return reference


def _fake(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def fake(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        sizes = check_qkv(name, q, k, v, g, beta, cu_seqlens)
        check_initial_state(name, initial_state, q, sizes)
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        return o, _new_final_state(initial_state, q, sizes)

    return fake
