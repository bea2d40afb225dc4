"""The operators on a pool, ``chunk_`` and ``recurrent_``: check, load, scan, store."""

import torch
from torch import Tensor

from ._checks import (
    Sizes,
    check_matrix_rows,
    check_null_index,
    check_pool,
    check_qkv,
    check_slots,
    state_dtypes,
)
from ._recurrence import StartScan, Store, Tokens, state_blocks
from ._sequences import Bounds, as_index, load_states, new_output, store_states
from ._slots import Slots, check_bounds, fresh_rows, resolve_slots


def check_update(
    op: str,
    tokens: Tokens,
    state: Tensor,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    null_index: int,
    per_sequence: dict[str, Tensor | None],
) -> Sizes:
    """Check the arguments of an operator on a pool; ``per_sequence`` are those of shape ``[N]``."""
    q, k, v, g, beta = tokens[:5]
    sizes = check_qkv(op, q, k, v, g, beta, cu_seqlens)
    matrix = (sizes.HV, sizes.V, sizes.K)
    check_pool(op, state, q, "q", "[slots, HV, V, K]", matrix, state_dtypes(q.dtype))
    check_matrix_rows(op, state)
    check_slots(op, state, state_indices, sizes.N, per_sequence)
    check_null_index(op, null_index)
    return sizes


def new_update_output(v: Tensor) -> Tensor:
    """The fake output of an operator on a pool."""
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def check_update_data(
    op: str,
    x: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    null_index: int,
    read_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
) -> tuple[Bounds, Slots]:
    """Bounds and slots of a call, read on the host and checked."""
    check_bounds(op, cu_seqlens, x.shape[1])
    bounds = Bounds.of(x, cu_seqlens)
    slots = resolve_slots(
        op, bounds, state.shape[0], state_indices, read_indices, num_accepted_tokens, null_index
    )
    return bounds, slots


def update_pool(
    op: str,
    start: StartScan,
    tokens: Tokens,
    state: Tensor,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    null_index: int,
    *,
    read_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
) -> Tensor:
    """Scan every live sequence from its slot; store the state after the last or each token."""
    bounds, slots = check_update_data(
        op,
        tokens.q,
        state,
        state_indices,
        cu_seqlens,
        null_index,
        read_indices,
        num_accepted_tokens,
    )
    per_token = state_indices is not None and state_indices.dim() == 2
    o = new_output(tokens.v, bounds, slots.live)
    scan = start(tokens, o)
    for block in state_blocks(tokens, bounds, slots.live):
        read = [slots.read[n] for n in block.ids]
        write = [slots.write[n] for n in block.ids]
        S = load_states(state, read, tokens.dtype)
        if per_token or read != [w[0] for w in write]:
            S = S.clone()  # a slot that is only read keeps its content
        fresh = fresh_rows(has_initial_state, block.ids, S)
        if fresh is not None:
            S = S.masked_fill(fresh, 0)
        store = _token_store(state, write, null_index) if per_token else None
        S = scan(block, S, store)
        if not per_token:
            store_states(state, [w[0] for w in write], S)
    return o


def _token_store(state: Tensor, write: list[list[int]], null_index: int) -> Store:
    """Stores the states after token ``t`` in column ``t`` of the table, but for null entries."""

    def store(t: int, S: Tensor) -> None:
        rows = [i for i, slots in enumerate(write) if slots[t] > null_index]
        if rows:
            values = S[as_index(rows, S.device)].to(state.dtype)
            state[as_index([write[i][t] for i in rows], state.device)] = values

    return store
