"""One chunk of the gated delta rule as matrix products, forward and backward.

All tensors are in the arithmetic dtype and laid out by head, with the ``R = HV / H`` value heads of
a key head in a dimension of their own, so that nothing is repeated:

    q k      [n, H, 1, BT, K]        v U o    [n, H, R, BT, V]        (q is scaled)
    G beta   [n, H, R, BT]           S        [n, H, R, V, K]        (G is the cumulated log decay)

With ``D_ij = exp(G_i - G_j)`` for ``j <= i`` (masked *before* the exponential: the factored form
``exp(G_i) exp(-G_j)`` overflows under strong decay), the recurrence over a chunk is

    A  = strictly lower part of  beta_i D_ij <k_i, k_j>
    U  = (I + A)^-1 beta (v - exp(G) k S^T)                what each token writes
    O  = exp(G) q S^T + D <q, k> U
    S' = exp(G_last) S + U^T (exp(G_last - G) k)

which is the WY form of Yang et al. 2024 (https://arxiv.org/abs/2412.06464, section 3.3).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._recurrence import Tokens
from ._sequences import Block

# Tokens in a chunk. With a decay per key channel the pairwise decays are [BT, BT, K], so chunks are
# short. For small heads the [BT, BT] work outweighs that on states: BT = 32 instead of 64 at K = 32
# takes 0.82 of the forward's time and 0.91 of a training step's (AMD EPYC, torch 2.13, 2026-11-24).
_BT, _BT_SMALL_K, _BT_PER_CHANNEL = 64, 32, 16

# exp of this is zero in float64 too, so nothing changes, but differences of -inf would be NaN.
_RESET = -1000.0


class Chunk(NamedTuple):
    """Inputs of one chunk; ``G`` is ``[n, H, R, BT]``, with a decay per key channel ``[..., BT,
    K]``."""

    kq: Tensor  # keys, then scaled queries, [n, H, 1, 2 BT, K]
    v: Tensor
    G: Tensor  # float64
    beta: Tensor

    @property
    def k(self) -> Tensor:
        return self.kq.chunk(2, 3)[0]

    @property
    def q(self) -> Tensor:
        """The queries, scaled."""
        return self.kq.chunk(2, 3)[1]


class Pairs(NamedTuple):
    """What a chunk is, apart from states and values."""

    whole: Tensor  # decay from start to end, [n, H, R, 1, 1 or K]
    decay: Tensor  # decay from start to token, [n, H, R, BT, 1 or K]
    tail: Tensor  # decay from token to end, the same shape
    D: Tensor  # decay from token j to token i, zero for j > i, [n, H, R, BT, BT] or [..., K]
    KK: Tensor  # D_ij <k_i, k_j>, [n, H, R, BT, BT]
    QK: Tensor  # D_ij <q_i, k_j>, [n, H, R, BT, BT]


class Tape(NamedTuple):
    """What the backward of one chunk needs of its forward."""

    chunk: Chunk
    pairs: Pairs
    S: Tensor  # the state before the chunk
    U: Tensor  # [n, H, R, BT, V]
    inverse: Tensor  # (I + A)^-1, [n, H, R, BT, BT]


class ChunkGradients(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor
    dbeta: Tensor


def spans(tokens: Tokens, block: Block) -> list[tuple[int, int]]:
    """First and last-plus-one token of each chunk of a block; the last chunk may be short."""
    if tokens.g is not None and tokens.g.dim() == 4:
        BT = _BT_PER_CHANNEL
    else:
        BT = _BT if tokens.q.shape[3] >= 128 else _BT_SMALL_K
    return [(t, min(t + BT, block.length)) for t in range(0, block.length, BT)]


def read_chunk(tokens: Tokens, block: Block, t0: int, t1: int) -> Chunk:
    """Tokens ``t0 .. t1 - 1`` of a block, laid out by head, the log decay cumulated."""
    H = tokens.q.shape[2]
    q, k, v, g, beta = tokens.read(block, t0, t1).prepared()
    kq = torch.cat([x.movedim(1, 2)[:, :, None] for x in (k, tokens.scale * q)], 3)
    G = g.clamp(min=_RESET).cumsum(1, dtype=torch.float64)
    v, G, beta = (x.unflatten(2, (H, -1)).movedim(1, 3).contiguous() for x in (v, G, beta))
    return Chunk(kq, v, G, beta)


def _pairs(chunk: Chunk) -> Pairs:
    """Decays, each an ``exp`` of a difference, and the decayed products of keys and queries.

    The sums and differences are float64: ``G`` reaches hundreds, and a float32 difference of two
    such sums costs the chunked form an order of magnitude of accuracy against the token loop.
    """
    G, dtype = chunk.G, chunk.kq.dtype
    Gc = G if G.dim() == 5 else G[..., None]
    last = Gc[..., -1:, :]
    if G.dim() == 5:
        D = (Gc[..., :, None, :] - Gc[..., None, :, :]).movedim(-1, -3)  # [..., K, BT, BT]
        D = _exp(D.tril(), dtype).tril_().movedim(-3, -1)
        weighted = D * chunk.k[..., None, :, :]  # [n, H, R, BT, BT, K]
        KK, QK = ((weighted @ x[..., None]).squeeze(-1) for x in (chunk.k, chunk.q))
    else:
        D = _exp((Gc - Gc.mT).tril_(), dtype).tril_()
        KK, QK = (x * D for x in (chunk.kq @ chunk.k.mT).chunk(2, 3))
    return Pairs(_exp(last, dtype), _exp(Gc, dtype), _exp(last - Gc, dtype), D, KK, QK)


def _exp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``exp(x)``, no smaller than about the smallest normal number.

    A result that underflows takes torch 2.13 five times as long on a CPU (AMD EPYC, 2026-11-23).
    """
    return x.to(dtype).clamp(min=-87 if dtype == torch.float32 else -708).exp_()


def _read_state(x: Tensor, S: Tensor) -> Tensor:
    """``x S^T`` of keys or queries ``[n, H, 1, L, K]``: ``[n, H, R, L, V]``.

    The value heads of a key head are one matrix product, for which nothing is repeated.
    """
    product: Tensor = x.squeeze(2) @ S.flatten(2, 3).mT  # [n, H, L, R V]
    R, V = S.shape[2:4]
    return product.view(*product.shape[:3], R, V).movedim(3, 2)


def _read_decayed_state(x: Tensor, S: Tensor, decay: Tensor) -> list[Tensor]:
    """``decay * x_p S^T`` of each part ``x_p [n, H, 1, BT, K]`` of ``x``."""
    BT = decay.shape[3]
    if decay.shape[-1] > 1:
        return [(decay * part) @ S.mT for part in x.split(BT, 3)]
    return [part.mul_(decay) for part in _read_state(x, S).split(BT, 3)]


def _writes(chunk: Chunk, KK: Tensor, kS: Tensor) -> tuple[Tensor, Tensor]:
    """``U``, what each token writes, and ``(I + A)^-1``."""
    b = chunk.beta[..., None]
    A = b * KK
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    # From the right: torch then copies neither operand.
    inverse = torch.linalg.solve_triangular(
        A, identity, upper=False, left=False, unitriangular=True
    )
    return inverse @ (chunk.v - kS).mul_(b), inverse


def _add_product(S: Tensor, x: Tensor, y: Tensor, alpha: float = 1) -> None:
    """``S += alpha * x^T y`` for ``x [n, H, R, BT, V]`` and ``y [n, H, R, BT, K]``."""
    S.flatten(0, 2).baddbmm_(x.mT.flatten(0, 2), y.flatten(0, 2), alpha=alpha)


def forward_chunk(S: Tensor, chunk: Chunk) -> Tensor:
    """Returns ``o``; ``S``, contiguous, becomes the state after the chunk."""
    whole, decay, tail, _, KK, QK = _pairs(chunk)
    kS, qS = _read_decayed_state(chunk.kq, S, decay)
    U, _ = _writes(chunk, KK, kS)
    _add_product(S.mul_(whole), U, tail * chunk.k)
    return (QK @ U).add_(qS)


def replay_chunk(S: Tensor, chunk: Chunk) -> Tape:
    """Returns the tape; ``S``, contiguous, becomes the state after the chunk."""
    pairs = _pairs(chunk)
    (kS,) = _read_decayed_state(chunk.k, S, pairs.decay)
    U, inverse = _writes(chunk, pairs.KK, kS)
    tape = Tape(chunk, pairs, S.clone(), U, inverse)
    _add_product(S.mul_(pairs.whole), U, pairs.tail * chunk.k)
    return tape


def _over_group(x: Tensor) -> Tensor:
    """Sum over the value heads that one key head serves."""
    return x.sum(2, keepdim=True)


def backward_chunk(dS: Tensor, do: Tensor, tape: Tape) -> ChunkGradients:
    """Gradients of one chunk from ``do`` and ``dS``, the gradient of the state after it.

    No product contains the inverse twice: with ``U = X R`` and ``X = (I + A)^-1`` the gradient of
    ``A`` is ``-dR U^T`` where ``dR = X^T dU``, which saves the ``[BT, BT]`` products of the
    textbook form.

    ``dS``, contiguous, becomes the gradient of the state before the chunk.

    Returns:
        The gradients of the inputs: ``dq`` of the scaled queries, ``dg`` of the log decay itself,
        not of its sum.
    """
    chunk, (whole, decay, tail, D, KK, QK), S, U, inverse = tape
    k, q, beta = chunk.k, chunk.q, chunk.beta
    b = beta[..., None]

    dU = torch.addcmul(QK.mT @ do, tail, _read_state(k, dS))
    dR = inverse.mT @ dU
    dQK = do @ U.mT  # its upper part is cut by D below
    dA = (dR @ U.mT).tril_(-1).neg_()
    from_q = (do @ S).mul_(decay)  # dq of the state's part, [n, H, R, BT, K]
    from_k = (dR @ S).mul_(-decay)  # dk of the same, still without beta
    from_tail = (U @ dS).mul_(tail)

    dG_q, dG_k, dG_tail = ((x * y).sum(-1) for x, y in ((from_q, q), (from_k, k), (from_tail, k)))
    dbeta = (dR * chunk.v).sum(-1) + dG_k + (dA * KK).sum(-1)
    dA.mul_(b)
    weights = (dQK * QK).addcmul_(dA, KK)  # gradient of log D_ij
    dG = weights.sum(-1) - weights.sum(-2) + dG_q + beta * dG_k - dG_tail
    dG[..., -1] += dG_tail.sum(-1) + whole[..., 0, 0] * (dS * S).sum((-2, -1))
    dg = dG.flip(-1).cumsum(-1).flip(-1)

    pairs, keys = _over_group(dQK.mul_(D)), _over_group(dA.mul_(D))
    dq = (pairs @ k).add_(_over_group(from_q))
    dk = (pairs.mT @ q).add_((keys + keys.mT) @ k)
    dk.add_(_over_group(from_tail.addcmul_(b, from_k)))

    dS.mul_(whole)
    _add_product(dS, do, decay * q)
    _add_product(dS, dR, b * decay * k, alpha=-1)
    return ChunkGradients(dq, dk, b * dR, dg, dbeta)
