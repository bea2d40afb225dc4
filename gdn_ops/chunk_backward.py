"""Gradient of the gated delta rule, in chunks, and how autograd reaches it.

The states before each chunk are computed again from the inputs; then the chunks are walked
backwards, as the matrix products of ``_chunk_math.backward_chunks``. Memory is linear in ``T``: a
state, its writes and an inverse per chunk, for one block of sequences at a time.

``recurrent`` and ``chunk`` are the same function, so one gradient serves both, under an operator
name for each.

Source: checked by tests/test_gradients.py against float64 autograd through a loop over tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import Sizes, check_initial_state, check_qkv, check_shape
from ._chunk_math import (
    ChunkGradients,
    Span,
    backward_chunks,
    by_head,
    read_chunks,
    replay_chunks,
    spans,
)
from ._l2norm import l2norm_backward
from ._library import register_gradient, register_operator
from ._recurrence import Tokens, initial_states, state_blocks
from ._sequences import Block, Bounds, as_index

_SCHEMA = (
    "_backward(Tensor do, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor? g=None, "
    "Tensor? beta=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, *, float? scale=None, "
    "bool use_qk_l2norm=False) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dinitial_state)"
)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def refuse_per_channel_decay(op: str, g: Tensor | None) -> None:
    """Raise where the gradient of a decay per key channel would be needed.

    Raises:
        NotImplementedError: ``g`` is ``[B, T, HV, K]``.
    """
    if g is not None and g.dim() == 4:
        raise NotImplementedError(
            f"{op}: a gradient with g of shape [B, T, HV, K] (a decay per key channel) is not "
            "served; use g of shape [B, T, HV], or call it under torch.no_grad()"
        )


def _check(
    op: str,
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Sizes:
    sizes = check_qkv(op, q, k, v, g, beta, cu_seqlens)
    refuse_per_channel_decay(op, g)
    check_initial_state(op, initial_state, q, sizes)
    B, T, N, _, HV, K, V = sizes
    check_shape(op, "do", do, "[B, T, HV, V]", (B, T, HV, V))
    if dfinal_state is not None:
        check_shape(op, "dfinal_state", dfinal_state, "[N, HV, V, K]", (N, HV, V, K))
    return sizes


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, *optional: Tensor | None) -> Gradients:
    """Unwritten gradients like the inputs; of an input that is None, an empty tensor."""
    like = [q, k, v, *(x if x is not None else q.new_empty(0) for x in optional)]
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]
    return tuple(out)  # type: ignore[return-value]


def _reference(op: str) -> Callable[..., Gradients]:
    def backward(
        do: Tensor,
        dfinal_state: Tensor | None,
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
    ) -> Gradients:
        args = (q, k, v, g, beta, initial_state)
        sizes = _check(op, do, dfinal_state, *args, cu_seqlens)
        if dfinal_state is None:
            dfinal_state = do.new_zeros(sizes.N, sizes.HV, sizes.V, sizes.K)
        tokens = Tokens.of(q, k, v, g, beta, scale, use_qk_l2norm)
        bounds = Bounds.of(q, cu_seqlens)
        grads = _empty_gradients(*args)
        if sum(bounds.lengths) != sizes.B * sizes.T:
            for grad in grads[:5]:
                grad.zero_()  # tokens of no sequence
        if initial_state is not None:
            for n in (n for n, length in enumerate(bounds.lengths) if length == 0):
                grads[5][n] = dfinal_state[n]
        for block in state_blocks(tokens, bounds):
            S = initial_states(initial_state, block, tokens, sizes)
            index = as_index(block.ids, do.device)
            dS = dfinal_state[index].to(S.dtype, memory_format=torch.contiguous_format, copy=True)
            dS = _backward_block(tokens, block, S, do, dS, grads)
            if initial_state is not None:
                grads[5][index] = dS.to(initial_state.dtype)
        return grads

    return backward


def _backward_block(
    tokens: Tokens, block: Block, S: Tensor, do: Tensor, dS: Tensor, grads: Gradients
) -> Tensor:
    """Write the gradients of the tokens of one block; returns the gradient of its first states."""
    H = tokens.q.shape[2]
    S = S.unflatten(1, (H, -1))
    segments = spans(tokens, block)
    tape = [replay_chunks(S, read_chunks(tokens, block, span)) for span in segments]
    dS = dS.unflatten(1, (H, -1))
    for span in reversed(segments):
        do_chunks = by_head(block.read(do, span.start, span.stop).to(S.dtype), H, span.BT)
        step = backward_chunks(dS, do_chunks.contiguous(), tape.pop())
        _write_gradients(step, tokens, block, span, grads)
    return dS.flatten(1, 2)


def _by_token(x: Tensor) -> Tensor:
    """``[C, n, H, R, BT, ...]`` as tokens ``[n, C BT, H R, ...]``."""
    return x.movedim(4, 2).movedim(0, 1).flatten(3, 4).flatten(1, 2)


def _write_gradients(
    step: ChunkGradients, tokens: Tokens, block: Block, span: Span, grads: Gradients
) -> None:
    t0, t1, _ = span
    dq, dk = (_by_token(x) for x in (step.dq, step.dk))
    dq = dq * tokens.scale
    if tokens.use_qk_l2norm:
        dq = l2norm_backward(dq, block.read(tokens.q, t0, t1).to(dq.dtype))
        dk = l2norm_backward(dk, block.read(tokens.k, t0, t1).to(dk.dtype))
    block.write(grads[0], t0, t1, dq)
    block.write(grads[1], t0, t1, dk)
    for grad, value in zip(grads[2:5], (step.dv, step.dg, step.dbeta), strict=True):
        if grad.numel():
            block.write(grad, t0, t1, _by_token(value))


def _fake(op: str) -> Callable[..., Gradients]:
    def fake(
        do: Tensor,
        dfinal_state: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **_: Any,
    ) -> Gradients:
        args = (q, k, v, g, beta, initial_state)
        _check(op, do, dfinal_state, *args, cu_seqlens)
        return _empty_gradients(*args)

    return fake


def register_backward(name: str) -> None:
    """Define ``torch.ops.gdn.<name>_backward``, the gradient of ``torch.ops.gdn.<name>``."""
    op = f"{name}_backward"
    register_operator(
        name + _SCHEMA,
        _reference(op),
        _fake(op),
        kernels="chunk_backward",
        function="chunk_backward",
        cpu="chunk_backward",
    )

    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        refuse_per_channel_decay(name, inputs[3])
        ctx.set_materialize_grads(False)  # most often nobody asks for that of the final state
        ctx.save_for_backward(*inputs)
        ctx.keywords = keyword_only_inputs

    def backward(
        ctx: Any, do: Tensor | None, dfinal_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(inputs[2])
        grads = getattr(torch.ops.gdn, op)(do, dfinal_state, *inputs, **ctx.keywords)
        present = (grad if x is not None else None for grad, x in zip(grads, inputs, strict=False))
        return (*present, None)  # none for cu_seqlens

    register_gradient(name, backward, setup_context)
