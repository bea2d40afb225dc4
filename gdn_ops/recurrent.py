"""Gated delta rule, token by token: decode, multi-token verify, the definition of truth.

    S_t = exp(g_t) S_{t-1} + beta_t (v_t - exp(g_t) S_{t-1} k_t) k_t^T
    o_t = scale * S_t q_t

The state is V-major, ``S [V, K]``. It is the same function as ``chunk``, up to rounding.

Source: Yang et al. 2024, Gated Delta Networks, equation 10 (https://arxiv.org/abs/2412.06464);
checked by tests/test_recurrent.py against a float64 loop over tokens and against Hugging Face
transformers 5.23.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ._checks import holds
from ._functional import register_functional
from ._in_place import check_update, check_update_data, new_update_output, update_pool
from ._l2norm import l2norm
from ._library import refuse_gradient, register_operator
from ._recurrence import Scan, Store, Tokens
from ._sequences import Block
from .chunk_backward import register_backward


def recurrent(
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
    """Gated delta rule over whole sequences, token by token.

        S_t = exp(g_t) S_{t-1} + beta_t (v_t - exp(g_t) S_{t-1} k_t) k_t^T
        o_t = scale * S_t q_t

    Differentiable in its six tensors (``initial_state`` included; the gradient is computed in
    chunks); the arithmetic is float32. For more than a few tokens ``chunk`` is faster.

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

    Source: Yang et al. 2024, Gated Delta Networks, equation 10; tests/test_recurrent.py.
    """
    o, final_state = torch.ops.gdn.recurrent(
        q, k, v, g, beta, initial_state, cu_seqlens, scale=scale, use_qk_l2norm=use_qk_l2norm
    )
    return o, final_state


def recurrent_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    read_indices: Tensor | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    null_index: int = -1,
    exact: bool = False,
) -> Tensor:
    """Gated delta rule token by token on a pool of states, in place: decode and verify.

    With slots ``[N]`` a sequence reads its slot once and writes it once, after its last token. With
    a table ``[N, S]``, ``S`` = 1 + number of draft tokens, it starts from the state after the last
    token that was accepted and leaves the state after every token, so that a rejection costs
    nothing:

        S = pool[state_indices[n, num_accepted_tokens[n] - 1]]
        for t in 0 .. L-1:
            S, o[t] = step(S, token t)               float32 carried across tokens
            pool[state_indices[n, t]] = S

    A row is padding where the slot it reads, or with slots ``[N]`` writes, is ``<= null_index``,
    where its accepted count is outside ``1 .. S``, or where it has more than ``S`` tokens: it reads
    and writes no state and its output is zero. An entry ``<= null_index`` of a live row's table is
    only not written. A sequence of length 0 leaves its slots bitwise unchanged. ``q``, ``k``,
    ``v``, ``g``, ``beta``, ``scale`` and ``use_qk_l2norm`` are those of ``recurrent``.

    Args:
        q: Queries, ``[B, T, H, K]``.
        k: Keys, ``[B, T, H, K]``.
        v: Values, ``[B, T, HV, V]``.
        g: Log decay, ``[B, T, HV]`` or ``[B, T, HV, K]``, or None.
        beta: Write strength, ``[B, T, HV]``, or None.
        state: The pool, ``[slots, HV, V, K]``, float32, bfloat16 or float16; written. ``[V, K]``
            contiguous, any slot and head strides.
        state_indices: Slots ``[N]`` or table ``[N, S]``, int32 or int64. Default: slot ``n``.
        num_accepted_tokens: Tokens accepted in the previous step, the bonus token included,
            ``[N]``, int32 or int64, in ``1 .. S``; needs a table. Default: 1.
        cu_seqlens: Bounds of packed sequences, ``[N + 1]``; ``B`` must be 1. Default: ``N = B``.
        read_indices: Slot read by each sequence, ``[N]``, where it is not the one written; not
            together with ``num_accepted_tokens``. Default: the same.
        scale: Query scale. Default: ``K ** -0.5``.
        use_qk_l2norm: Normalise ``q`` and ``k``. Default: False.
        null_index: Slots up to this one are no slots, ``>= -1``. Default: -1.
        exact: Multi-token verify gives the same bits as decode of one token after the other, ``o``
            and states, also with a 16-bit pool: the state is rounded to the dtype of the pool after
            each token, and the arithmetic of a token depends on nothing but its inputs, whatever
            the number of tokens and rows and the form of the slots. Slower on a CPU, where tokens
            are computed one by one. Default: False.

    Returns:
        o: ``[B, T, HV, V]``, dtype of ``q``, contiguous; zero in padding rows and past
            ``cu_seqlens[-1]``.

    Raises:
        ValueError: a shape, dtype, device or stride breaks the table in ``gdn_ops/README.md``; on a
            CPU also a slot outside the pool; with ``GDN_DEBUG=1`` also two live rows on one slot
            and wrong bounds.
        NotImplementedError: ``K > 256``, or an input requires a gradient.

    Source: docs/semantics.md, multi-token update; tests/test_recurrent_verify.py and
        tests/test_recurrent_exact.py.
    """
    refuse_gradient("recurrent_", "recurrent", q, k, v, g, beta, state)
    o: Tensor = torch.ops.gdn.recurrent_(
        q,
        k,
        v,
        g,
        beta,
        state,
        state_indices,
        num_accepted_tokens,
        cu_seqlens,
        read_indices,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        null_index=null_index,
        exact=exact,
    )
    return o


def _start_scan(tokens: Tokens, o: Tensor) -> Scan:
    """The scan that walks the tokens of a block of sequences, updating their states in place.

    ``S k`` and ``S q`` are one product with the decayed state: the query reads the updated state,
    and ``(S + u k^T) q = S q + u <k, q>``.
    """
    dtype = tokens.dtype
    B, T, H, K = tokens.k.shape
    HV, V = tokens.v.shape[2:]
    R = HV // H
    kq = torch.stack([tokens.k.to(dtype), tokens.q.to(dtype)], 3)  # [B, T, H, 2, K]
    if tokens.use_qk_l2norm:
        kq = l2norm(kq)
    kq.select(3, 1).mul_(tokens.scale)
    k_dot_q = kq.prod(3).sum(-1).view(B, T, H, 1)
    v = tokens.v.to(dtype)
    beta = None if tokens.beta is None else tokens.beta.to(dtype)
    decay = None if tokens.g is None else tokens.g.exp().view(B, T, HV, 1, -1)  # last: 1 or K

    def scan(block: Block, S: Tensor, store: Store | None) -> Tensor:
        n = S.shape[0]
        heads = S.view(n * H, R * V, K)  # the value heads of a key head together
        for t in range(block.length):
            if decay is not None:
                S.view(n, 1, HV, V, K).mul_(block.read(decay, t, t + 1))
            kq_t = block.read(kq, t, t + 1).reshape(n * H, 2, K)
            kS, qS = torch.bmm(kq_t, heads.mT).view(n, 1, H, 2, R * V).unbind(3)
            u = block.read(v, t, t + 1).reshape(n, 1, H, R * V) - kS
            if beta is not None:
                u.view(n, 1, HV, V).mul_(block.read(beta, t, t + 1)[..., None])
            # Not baddbmm_: it takes twice as long (AMD EPYC, two threads, torch 2.13, 2026-11-24).
            heads.addcmul_(u.view(n * H, R * V, 1), kq_t[:, :1])
            o_t = torch.addcmul(qS, u, block.read(k_dot_q, t, t + 1))
            block.write(o, t, t + 1, o_t.view(n, 1, HV, V))
            if store is not None:
                store(t, S)
        return S

    return scan


def _start_exact_scan(pool: torch.dtype, tokens: Tokens, o: Tensor) -> Scan:
    """The scan of ``exact=True``: the state is rounded to the pool's dtype after each token.

    Which instructions a function of torch takes, and so its last bits, may depend on the number of
    rows, on strides and on alignment. So each token of each sequence is computed by itself, from
    copies: then all calls have the same shapes and layouts.
    """

    def scan(block: Block, S: Tensor, store: Store | None) -> Tensor:
        for t in range(block.length):
            token = tokens.read(block, t, t + 1)
            o_t = o.new_empty((S.shape[0], 1, *o.shape[2:]))
            for n in range(S.shape[0]):
                o_t[n, 0], S_n = _exact_step(token, n, S[n])
                S[n] = S_n.to(pool)
            block.write(o, t, t + 1, o_t)
            if store is not None:
                store(t, S)
        return S

    return scan


def _exact_step(token: Tokens, n: int, S: Tensor) -> tuple[Tensor, Tensor]:
    """``o [HV, V]`` of row ``n`` of ``token [n, 1, ...]``, and the state after it."""

    def copy(x: Tensor) -> Tensor:
        return x.to(token.dtype, copy=True, memory_format=torch.contiguous_format)

    q, k, v = (copy(x[n, 0]) for x in token[:3])  # [H, K], [H, K], [HV, V]
    H, K = q.shape
    if token.use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    q, k = (q * token.scale).view(H, 1, 1, K), k.view(H, 1, 1, K)
    S = copy(S).view(H, -1, v.shape[1], K)  # [H, R, V, K]
    if token.g is not None:
        S *= copy(token.g[n, 0]).exp().view(H, S.shape[1], 1, -1)
    u = v.view(S.shape[:3]) - (S * k).sum(-1)
    if token.beta is not None:
        u *= copy(token.beta[n, 0]).view(H, -1, 1)
    S.addcmul_(u[..., None], k)
    return (S * q).sum(-1).view(v.shape), S.view(-1, v.shape[1], K)


def _check_(
    tokens: Tokens,
    state: Tensor,
    state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    cu_seqlens: Tensor | None,
    read_indices: Tensor | None,
    null_index: int,
) -> None:
    op = "recurrent_"
    table = state_indices is not None and state_indices.dim() == 2
    if num_accepted_tokens is not None and not table:
        raise ValueError(
            f"{op}: num_accepted_tokens must come with a table state_indices [N, S], got "
            + ("None" if state_indices is None else f"shape {list(state_indices.shape)}")
        )
    if num_accepted_tokens is not None and read_indices is not None:
        raise ValueError(f"{op}: read_indices must be None with num_accepted_tokens, got both")
    per_sequence = {"num_accepted_tokens": num_accepted_tokens, "read_indices": read_indices}
    check_update(op, tokens, state, state_indices, cu_seqlens, null_index, per_sequence)
    if state_indices is not None and table and cu_seqlens is None:
        T, S = tokens.q.shape[1], state_indices.shape[1]
        if holds(T > S):
            raise ValueError(f"{op}: q must have T <= S = {S} tokens with a table [N, S], got {T}")


def _reference_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    read_indices: Tensor | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    null_index: int = -1,
    exact: bool = False,
) -> Tensor:
    slots = (state, state_indices, num_accepted_tokens, cu_seqlens, read_indices, null_index)
    _check_(Tokens(q, k, v, g, beta, 1.0, use_qk_l2norm), *slots)
    tokens = Tokens.of(q, k, v, g, beta, scale, use_qk_l2norm)  # the default scale needs K >= 1
    start = functools.partial(_start_exact_scan, state.dtype) if exact else _start_scan
    return update_pool(
        "recurrent_",
        start,
        tokens,
        state,
        state_indices,
        cu_seqlens,
        null_index,
        read_indices=read_indices,
        num_accepted_tokens=num_accepted_tokens,
    )


def _fake_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    read_indices: Tensor | None = None,
    *,
    null_index: int = -1,
    **_: Any,
) -> Tensor:
    tokens = Tokens(q, k, v, g, beta, 1.0, False)
    slots = (state, state_indices, num_accepted_tokens, cu_seqlens, read_indices, null_index)
    _check_(tokens, *slots)
    return new_update_output(v)


def _check_data_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    read_indices: Tensor | None = None,
    *,
    null_index: int = -1,
    **_: Any,
) -> None:
    slots = (read_indices, num_accepted_tokens)
    check_update_data("recurrent_", q, state, state_indices, cu_seqlens, null_index, *slots)


register_functional("recurrent", _start_scan, kernels="recurrent", cpu="recurrent")
register_backward("recurrent")
register_operator(
    "recurrent_(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor(a!) state, "
    "Tensor? state_indices=None, Tensor? num_accepted_tokens=None, Tensor? cu_seqlens=None, "
    "Tensor? read_indices=None, *, float? scale=None, bool use_qk_l2norm=False, int null_index=-1, "
    "bool exact=False) -> Tensor",
    _reference_,
    _fake_,
    kernels="recurrent",
    check_data=_check_data_,
    cpu="recurrent",
)
