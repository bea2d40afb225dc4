"""Chunks of the gated delta rule as matrix products, forward and backward.

Chunks are computed a segment at a time: what does not depend on the state for all ``C`` chunks of a
segment at once, the rest chunk after chunk. All tensors are in the arithmetic dtype and laid out by
head, with the ``R = HV / H`` value heads of a key head in a dimension of their own, so that nothing
is repeated:

    q k      [C, n, H, 1, BT, K]     v U o    [C, n, H, R, BT, V]     (q is scaled)
    G beta   [C, n, H, R, BT]        S           [n, H, R, V, K]      (G is the cumulated log decay)

With ``D_ij = exp(G_i - G_j)`` for ``j <= i`` (masked *before* the exponential: the factored form
``exp(G_i) exp(-G_j)`` overflows under strong decay), the recurrence over a chunk is

    A  = strictly lower part of  beta_i D_ij <k_i, k_j>
    W  = v - exp(G) k S^T
    U  = (I + A)^-1 beta W                                 what each token writes
    O  = exp(G) q S^T + D <q, k> U
    S' = exp(G_last) S + U^T (exp(G_last - G) k)

which is the WY form of Yang et al. 2024 (https://arxiv.org/abs/2412.06464, section 3.3).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._l2norm import inverse_l2norm
from ._recurrence import Tokens
from ._sequences import Block

# Tokens in a chunk. With a decay per key channel the pairwise decays are [BT, BT, K], so chunks are
# short. BT = 64 takes 1.09 of the time of a prefill of (1, 2048, 16, 32, 128, 128), and 1.37 of
# a training step of (8, 512, 2, 4, 32, 32) (AMD EPYC, one thread, torch 2.13, 2026-11-24).
_BT, _BT_PER_CHANNEL = 32, 16

# Size of the values of a segment. A training step of (8, 512, 2, 4, 32, 32) takes 1.31 of the time
# in segments of one chunk, a prefill of (1, 2048, 16, 32, 128, 128) 1.34 in segments of 4 MiB (same
# machine and date).
_SEGMENT_BYTES = 1 << 20

# exp of this is zero in float64 too, so nothing changes, but differences of -inf would be NaN.
_RESET = -1000.0


class Span(NamedTuple):
    """Tokens ``start .. stop - 1`` of each sequence of a block: one segment."""

    start: int
    stop: int
    BT: int  # divides their number


class Chunks(NamedTuple):
    """Inputs of a segment; ``G`` is ``[C, n, H, R, BT]``, with a decay per key channel ``[..., BT,
    K]``."""

    kq: Tensor  # keys, then scaled queries, [C, n, H, 1, 2 BT, K]
    v: Tensor  # any strides
    G: Tensor  # float64
    beta: Tensor

    @property
    def k(self) -> Tensor:
        return self.kq.chunk(2, -2)[0]

    @property
    def q(self) -> Tensor:
        """The queries, scaled."""
        return self.kq.chunk(2, -2)[1]


class Pairs(NamedTuple):
    """What chunks are, apart from states and values."""

    whole: Tensor  # decay from start to end, [C, n, H, R, 1, 1 or K]
    decay: Tensor  # decay from start to token, [C, n, H, R, BT, 1 or K]
    tail: Tensor  # decay from token to end, the same shape
    D: Tensor  # decay from token j to token i, zero for j > i, [C, n, H, R, BT, BT] or [..., K]
    KK: Tensor  # D_ij <k_i, k_j>, [C, n, H, R, BT, BT]
    QK: Tensor  # D_ij <q_i, k_j>, [C, n, H, R, BT, BT]


class Tape(NamedTuple):
    """What the backward of a segment needs of its forward."""

    chunks: Chunks
    pairs: Pairs
    S: Tensor  # the states before each chunk, [C, n, H, R, V, K]
    U: Tensor  # [C, n, H, R, BT, V]
    inverse: Tensor  # (I + A)^-1, [C, n, H, R, BT, BT]


class ChunkGradients(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor
    dbeta: Tensor


def spans(tokens: Tokens, block: Block) -> list[Span]:
    """The segments of a block, in order; the last chunk, a segment of its own, may be short."""
    HV, V = tokens.v.shape[2:]
    K, L = tokens.q.shape[3], block.length
    if tokens.g is not None and tokens.g.dim() == 4:
        BT = longest = _BT_PER_CHANNEL
    else:
        BT = _BT
        chunk_bytes = len(block.ids) * HV * BT * max(K, V) * tokens.dtype.itemsize
        longest = BT * max(1, _SEGMENT_BYTES // chunk_bytes)
    whole = L - L % BT
    segments = [Span(t, min(t + longest, whole), BT) for t in range(0, whole, longest)]
    return segments + ([Span(whole, L, L - whole)] if whole < L else [])


def by_head(x: Tensor, H: int, BT: int) -> Tensor:
    """A view ``[C, n, H, R, BT, ...]`` of tokens ``[n, C BT, H R, ...]``."""
    x = x.unflatten(1, (-1, BT)).unflatten(3, (H, -1))  # [n, C, BT, H, R, ...]
    return x.movedim(1, 0).movedim(2, 4)


def read_chunks(tokens: Tokens, block: Block, span: Span) -> Chunks:
    """The tokens of a segment, laid out by head, the log decay cumulated."""
    H, BT = tokens.q.shape[2], span.BT
    q, k, v, g, beta = tokens.read(block, span.start, span.stop).prepared()
    factors: list[Tensor | float] = [1.0, tokens.scale]
    if tokens.use_qk_l2norm:
        norms = [by_head(inverse_l2norm(x), H, BT) for x in (k, q)]
        factors = [norm * factor for norm, factor in zip(norms, factors, strict=True)]
    k, q, v = (by_head(x, H, BT) for x in (k, q, v))
    kq = k.new_empty((*k.shape[:4], 2 * BT, k.shape[5]))
    for x, factor, part in zip((k, q), factors, kq.chunk(2, -2), strict=True):
        torch.mul(x, factor, out=part)
    G = by_head(g, H, BT).contiguous().clamp(min=_RESET).cumsum(4, dtype=torch.float64)
    return Chunks(kq, v, G, by_head(beta, H, BT).contiguous())


def _pairs(chunks: Chunks) -> Pairs:
    """Decays, each an ``exp`` of a difference, and the decayed products of keys and queries.

    The sums and differences are float64: ``G`` reaches hundreds, and a float32 difference of two
    such sums costs the chunked form an order of magnitude of accuracy against the token loop.
    """
    G, dtype = chunks.G, chunks.kq.dtype
    Gc = G if G.dim() == 6 else G[..., None]
    last = Gc[..., -1:, :]
    if G.dim() == 6:
        D = (Gc[..., :, None, :] - Gc[..., None, :, :]).movedim(-1, -3)  # [..., K, BT, BT]
        D = _exp(D.tril(), dtype).tril_().movedim(-3, -1)
        weighted = D * chunks.k[..., None, :, :]  # [C, n, H, R, BT, BT, K]
        KK, QK = ((weighted @ x[..., None]).squeeze(-1) for x in (chunks.k, chunks.q))
    else:
        D = _exp((Gc - Gc.mT).tril_(), dtype).tril_()
        KK, QK = (x * D for x in (chunks.kq @ chunks.k.mT).chunk(2, -2))
    return Pairs(_exp(last, dtype), _exp(Gc, dtype), _exp(last - Gc, dtype), D, KK, QK)


def _exp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``exp(x)``, no smaller than about the smallest normal number.

    A result that underflows takes torch 2.13 five times as long on a CPU (AMD EPYC, 2026-11-23).
    """
    return x.to(dtype).clamp(min=-87 if dtype == torch.float32 else -708).exp_()


def _inverse(beta: Tensor, KK: Tensor) -> Tensor:
    """``(I + A)^-1`` of each chunk."""
    A = beta[..., None] * KK
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    # From the right: torch then copies neither operand.
    inverse: Tensor = torch.linalg.solve_triangular(
        A, identity, upper=False, left=False, unitriangular=True
    )
    return inverse


def _matrices(x: Tensor) -> Tensor:
    """All matrices of ``x`` in one batch."""
    return x.flatten(0, -3)


def _new_reads(x: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for ``x S^T`` of keys or queries ``x [C, n, H, P, L, K]``, ``P`` being 1 or ``R``.

    The value heads of a key head are one matrix product, for which nothing is repeated.

    Returns:
        What ``_read_state`` writes, and a view of it, ``[C, n, H, R, L, V]``.
    """
    C, n, H, P, L, _ = x.shape
    R, V = S.shape[2:4]
    product = x.new_empty((C, n * H * P, L, R // P * V))
    by_value_head = product.view(C, n, H, P, L, R // P, V).transpose(4, 5).flatten(3, 4)
    return product, by_value_head


def _read_state(x: Tensor, S: Tensor, out: Tensor) -> None:
    """``x S^T`` of one chunk."""
    rows = _matrices(x)
    torch.bmm(rows, S.view(rows.shape[0], -1, S.shape[-1]).mT, out=out)


def _add_product(S: Tensor, x: Tensor, y: Tensor, alpha: float = 1) -> None:
    """``S += alpha * x^T y`` for ``x [n, H, R, BT, V]`` and ``y [n, H, R, BT, K]``."""
    _matrices(S).baddbmm_(_matrices(x).mT, _matrices(y), alpha=alpha)


class _Walk(NamedTuple):
    U: Tensor
    inverse: Tensor
    reads: Tensor  # x S^T, the states those before each chunk
    decay: Tensor  # the factor that reads still lack


def _walk(S: Tensor, chunks: Chunks, pairs: Pairs, x: Tensor, states: Tensor | None) -> _Walk:
    """Carry ``S`` through the chunks of a segment.

    Args:
        S: The state before the segment, contiguous; becomes the one after it.
        chunks: The inputs.
        pairs: What ``_pairs`` makes of them.
        x: The keys, or the keys and queries, which read the state before each chunk.
        states: Where to keep these states.
    """
    BT, decay = chunks.v.shape[4], pairs.decay
    if decay.shape[-1] > 1:
        x, decay = decay.repeat(1, 1, 1, 1, x.shape[4] // BT, 1) * x, decay.new_ones(1)
    decay = decay.expand(*chunks.v.shape[:5], 1)
    product, reads = _new_reads(x, S)
    b, tail_k = chunks.beta[..., None], pairs.tail * chunks.k
    inverse = _inverse(chunks.beta, pairs.KK)
    U = chunks.kq.new_empty(chunks.v.shape)
    W = U.new_empty(U.shape[1:])
    for c in range(U.shape[0]):
        if states is not None:
            states[c] = S
        _read_state(x[c], S, product[c])
        torch.addcmul(chunks.v[c], decay[c], reads[c, ..., :BT, :], value=-1, out=W).mul_(b[c])
        torch.bmm(_matrices(inverse[c]), _matrices(W), out=_matrices(U[c]))
        _add_product(S.mul_(pairs.whole[c]), U[c], tail_k[c])
    return _Walk(U, inverse, reads, decay)


def forward_chunks(S: Tensor, chunks: Chunks, out: Tensor) -> None:
    """Write ``o`` to ``out``; ``S``, contiguous, becomes the state after the segment."""
    pairs = _pairs(chunks)
    U, _, reads, decay = _walk(S, chunks, pairs, chunks.kq, None)
    torch.addcmul(pairs.QK @ U, decay, reads[..., out.shape[4] :, :], out=out)


def replay_chunks(S: Tensor, chunks: Chunks) -> Tape:
    """Returns the tape; ``S``, contiguous, becomes the state after the segment."""
    pairs = _pairs(chunks)
    states = S.new_empty((chunks.v.shape[0], *S.shape))
    U, inverse, *_ = _walk(S, chunks, pairs, chunks.k, states)
    return Tape(chunks, pairs, states, U, inverse)


def _over_group(x: Tensor) -> Tensor:
    """Sum over the value heads that one key head serves."""
    return x.sum(3, keepdim=True)


def _walk_back(
    dS: Tensor, do: Tensor, tape: Tape, written_q: Tensor, written_k: Tensor
) -> tuple[Tensor, Tensor]:
    """Carry ``dS`` back through the chunks of a segment.

    Args:
        dS: The gradient of the state after the segment; becomes that of the state before it.
        do: The gradient of ``o``.
        tape: What ``replay_chunks`` returned.
        written_q: ``exp(G) q``, by which ``do`` reaches the state before its chunk.
        written_k: ``beta exp(G) k``, by which ``dR`` does.

    Returns:
        ``dR``, and the gradients of the states after each chunk.
    """
    chunks, pairs = tape.chunks, tape.pairs
    dU = pairs.QK.mT @ do
    dR, after = torch.empty_like(dU), torch.empty_like(tape.S)
    product, reads = _new_reads(chunks.k, dS)
    for c in reversed(range(dU.shape[0])):
        after[c] = dS
        _read_state(chunks.k[c], dS, product[c])
        dU[c].addcmul_(pairs.tail[c], reads[c])
        torch.bmm(_matrices(tape.inverse[c]).mT, _matrices(dU[c]), out=_matrices(dR[c]))
        _add_product(dS.mul_(pairs.whole[c]), do[c], written_q[c])
        _add_product(dS, dR[c], written_k[c], alpha=-1)
    return dR, after


def backward_chunks(dS: Tensor, do: Tensor, tape: Tape) -> ChunkGradients:
    """Gradients of a segment from ``do`` and ``dS``, the gradient of the state after it.

    No product contains the inverse twice: with ``U = X R`` and ``X = (I + A)^-1`` the gradient of
    ``A`` is ``-dR U^T`` where ``dR = X^T dU``, which saves the ``[BT, BT]`` products of the
    textbook form.

    ``dS``, contiguous, becomes the gradient of the state before the segment.

    Returns:
        The gradients of the inputs: ``dq`` of the scaled queries, ``dg`` of the log decay itself,
        not of its sum.
    """
    chunks, (whole, decay, tail, D, KK, QK), S, U, _ = tape
    k, q, beta = chunks.k, chunks.q, chunks.beta
    b = beta[..., None]
    dR, dS = _walk_back(dS, do, tape, decay * q, b * decay * k)

    dQK = do @ U.mT  # its upper part is cut by D below
    dA = (dR @ U.mT).tril_(-1).neg_()
    from_q = (do @ S).mul_(decay)  # dq of the state's part, [C, n, H, R, BT, K]
    from_k = (dR @ S).mul_(-decay)  # dk of the same, still without beta
    from_tail = (U @ dS).mul_(tail)

    dG_q, dG_k, dG_tail = ((x * y).sum(-1) for x, y in ((from_q, q), (from_k, k), (from_tail, k)))
    dbeta = (dR * chunks.v).sum(-1) + dG_k + (dA * KK).sum(-1)
    dA.mul_(b)
    weights = (dQK * QK).addcmul_(dA, KK)  # gradient of log D_ij
    dG = weights.sum(-1) - weights.sum(-2) + dG_q + beta * dG_k - dG_tail
    dG[..., -1] += dG_tail.sum(-1) + whole[..., 0, 0] * (dS * S).sum((-2, -1))
    dg = dG.flip(-1).cumsum(-1).flip(-1)

    pairs, keys = _over_group(dQK.mul_(D)), _over_group(dA.mul_(D))
    dq = (pairs @ k).add_(_over_group(from_q))
    dk = (pairs.mT @ q).add_((keys + keys.mT) @ k)
    dk.add_(_over_group(from_tail.addcmul_(b, from_k)))
    return ChunkGradients(dq, dk, b * dR, dg, dbeta)
