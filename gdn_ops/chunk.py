"""Gated delta rule in chunks: prefill and training.

    S_t = exp(g_t) S_{t-1} + beta_t (v_t - exp(g_t) S_{t-1} k_t) k_t^T
    o_t = scale * S_t q_t

computed for chunks of tokens as matrix products (``_chunk_math.py``). The state is V-major, ``S [V,
K]``. It is the same function as ``recurrent``, up to rounding.

Source: Yang et al. 2024, Gated Delta Networks, equation 10 (https://arxiv.org/abs/2412.06464);
checked by tests/test_chunk.py against a float64 loop over tokens and against Hugging Face
transformers 5.23.
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import check_rank
from ._chunk_math import by_head, forward_chunks, read_chunks, spans
from ._functional import register_functional
from ._in_place import check_update, check_update_data, new_update_output, update_pool
from ._library import refuse_gradient, register_operator
from ._recurrence import Scan, Store, Tokens
from ._sequences import Block
from .chunk_backward import register_backward


def chunk(
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
    """Gated delta rule over whole sequences, in chunks.

        S_t = exp(g_t) S_{t-1} + beta_t (v_t - exp(g_t) S_{t-1} k_t) k_t^T
        o_t = scale * S_t q_t

    Differentiable in its six tensors (``initial_state`` included); the arithmetic is float32.

    Args:
        q: Queries, ``[B, T, H, K]``, float32, bfloat16 or float16; any strides. ``K <= 256``.
        k: Keys, ``[B, T, H, K]``, dtype of ``q``.
        v: Values, ``[B, T, HV, V]``, dtype of ``q``; ``HV % H == 0``, value head ``i`` reads key
            head ``i // (HV // H)``.
        g: Log decay, natural logarithm, ``<= 0``, ``[B, T, HV]``, or ``[B, T, HV, K]`` for a decay
            per key channel (no gradient then), float32. Default: no decay.
        beta: Write strength, after the sigmoid, in ``[0, 1]`` (``[0, 2]`` with negative
            eigenvalues), ``[B, T, HV]``, float32 or dtype of ``q``. Default: ones.
        initial_state: ``[N, HV, V, K]``, float32, bfloat16 or float16. Default: zeros.
        cu_seqlens: Bounds of packed sequences, ``[N + 1]``, int32 or int64; ``B`` must be 1.
            Default: each row of the batch is a sequence, ``N = B``.
        scale: Query scale, applied after the l2 norm. Default: ``K ** -0.5``.
        use_qk_l2norm: Normalise ``q`` and ``k``: ``x * rsqrt(sum(x * x) + 1e-6)``. Default: False.

    Returns:
        o: ``[B, T, HV, V]``, dtype of ``q``, contiguous. Rows past ``cu_seqlens[-1]`` are zero.
        final_state: ``[N, HV, V, K]``, dtype of ``initial_state``, else float32; a new tensor.

    Raises:
        ValueError: a shape, dtype or device breaks the table in ``gdn_ops/README.md``.
        NotImplementedError: ``K > 256``, or a gradient is asked for with ``g`` per key channel.

    Source: Yang et al. 2024, Gated Delta Networks, equation 10; tests/test_chunk.py.
    """
    o, final_state = torch.ops.gdn.chunk(
        q, k, v, g, beta, initial_state, cu_seqlens, scale=scale, use_qk_l2norm=use_qk_l2norm
    )
    return o, final_state


def chunk_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    read_indices: Tensor | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    null_index: int = -1,
) -> Tensor:
    """Gated delta rule over whole sequences, in chunks, on a pool of states, in place.

        S = pool[read slot of n], or zeros
        o, S = chunk(tokens of n, initial_state=S)
        pool[state_indices[n]] = S

    A row is padding where the slot it reads or the slot it writes is ``<= null_index``: it reads
    and writes no state and its output is zero. A sequence of length 0 leaves its slot bitwise
    unchanged. ``q``, ``k``, ``v``, ``g``, ``beta``, ``scale`` and ``use_qk_l2norm`` are those of
    ``chunk``.

    Args:
        q: Queries, ``[B, T, H, K]``.
        k: Keys, ``[B, T, H, K]``.
        v: Values, ``[B, T, HV, V]``.
        g: Log decay, ``[B, T, HV]`` or ``[B, T, HV, K]``, or None.
        beta: Write strength, ``[B, T, HV]``, or None.
        state: The pool, ``[slots, HV, V, K]``, float32, bfloat16 or float16; written. ``[V, K]``
            contiguous, any slot and head strides.
        state_indices: Slot read and written by each sequence, ``[N]``, int32 or int64. None: slot
            ``n``.
        has_initial_state: ``[N]``, bool; where False the sequence starts from zero and overwrites
            its slot, whatever it holds. Default: all True.
        cu_seqlens: Bounds of packed sequences, ``[N + 1]``; ``B`` must be 1. Default: ``N = B``.
        read_indices: Slot read by each sequence, ``[N]``, where it is not the one written. Default:
            the same.
        scale: Query scale. Default: ``K ** -0.5``.
        use_qk_l2norm: Normalise ``q`` and ``k``. Default: False.
        null_index: Slots up to this one are no slots, ``>= -1``. Default: -1.

    Returns:
        o: ``[B, T, HV, V]``, dtype of ``q``, contiguous; zero in padding rows and past
            ``cu_seqlens[-1]``.

    Raises:
        ValueError: a shape, dtype, device or stride breaks the table in ``gdn_ops/README.md``; on a
            CPU also a slot outside the pool; with ``GDN_DEBUG=1`` also two live rows on one slot
            and wrong bounds.
        NotImplementedError: ``K > 256``, or an input requires a gradient.

    Source: docs/semantics.md, state pools; tests/test_pools.py.
    """
    refuse_gradient("chunk_", "chunk", q, k, v, g, beta, state)
    o: Tensor = torch.ops.gdn.chunk_(
        q,
        k,
        v,
        g,
        beta,
        state,
        state_indices,
        has_initial_state,
        cu_seqlens,
        read_indices,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        null_index=null_index,
    )
    return o


def _start_scan(tokens: Tokens, o: Tensor) -> Scan:
    """The scan that walks the chunks of a block of sequences."""

    def scan(block: Block, S: Tensor, store: Store | None) -> Tensor:
        assert store is None, "a state per token is the recurrent form's"
        S = S.unflatten(1, (tokens.q.shape[2], -1))  # [n, H, R, V, K]
        for span in spans(tokens, block):
            out = block.read(o, span.start, span.stop)  # [n, C BT, HV, V]
            in_place = block.adjacent and o.dtype == S.dtype
            if not in_place:
                out = torch.empty_like(out, dtype=S.dtype)
            chunks = read_chunks(tokens, block, span)
            forward_chunks(S, chunks, by_head(out, tokens.q.shape[2], span.BT))
            if not in_place:
                block.write(o, span.start, span.stop, out)
        return S.flatten(1, 2)

    return scan


def _check_(
    tokens: Tokens,
    state: Tensor,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    read_indices: Tensor | None,
    null_index: int,
) -> None:
    if state_indices is not None:
        check_rank("chunk_", "state_indices", state_indices, "[N]")
    per_sequence = {"has_initial_state": has_initial_state, "read_indices": read_indices}
    check_update("chunk_", tokens, state, state_indices, cu_seqlens, null_index, per_sequence)


def _reference_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    read_indices: Tensor | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    null_index: int = -1,
) -> Tensor:
    slots = (state, state_indices, has_initial_state, cu_seqlens, read_indices, null_index)
    _check_(Tokens(q, k, v, g, beta, 1.0, use_qk_l2norm), *slots)
    tokens = Tokens.of(q, k, v, g, beta, scale, use_qk_l2norm)  # the default scale needs K >= 1
    return update_pool(
        "chunk_",
        _start_scan,
        tokens,
        state,
        state_indices,
        cu_seqlens,
        null_index,
        read_indices=read_indices,
        has_initial_state=has_initial_state,
    )


def _fake_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    read_indices: Tensor | None = None,
    *,
    null_index: int = -1,
    **_: Any,
) -> Tensor:
    tokens = Tokens(q, k, v, g, beta, 1.0, False)
    _check_(tokens, state, state_indices, has_initial_state, cu_seqlens, read_indices, null_index)
    return new_update_output(v)


def _check_data_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    read_indices: Tensor | None = None,
    *,
    null_index: int = -1,
    **_: Any,
) -> None:
    slots = (state, state_indices, cu_seqlens, null_index, read_indices)
    check_update_data("chunk_", q, *slots)


register_functional("chunk", _start_scan, kernels="chunk", cpu="recurrent")
register_backward("chunk")
register_operator(
    "chunk_(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor(a!) state, "
    "Tensor? state_indices, Tensor? has_initial_state=None, Tensor? cu_seqlens=None, "
    "Tensor? read_indices=None, *, float? scale=None, bool use_qk_l2norm=False, int null_index=-1) "
    "-> Tensor",
    _reference_,
    _fake_,
    kernels="chunk",
    check_data=_check_data_,
    cpu="recurrent",
)
