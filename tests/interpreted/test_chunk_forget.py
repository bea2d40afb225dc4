"""What chunks keep of a state, and whether segments forget, in Triton's interpreter."""

import pytest
import torch
import triton  # noqa: TID253  # conftest.py sets the environment first
import triton.language as tl  # noqa: TID253
from inputs import cu_seqlens, make_inputs

from gdn_ops.kernels import chunk_segments
from gdn_ops.kernels.chunk_forget import all_forget

BT, LOOK, K, V = 32, 4, 16, 8


@pytest.fixture
def segments(monkeypatch):
    monkeypatch.setattr(chunk_segments, "LOOK", LOOK)
    return chunk_segments


def _tokens(B, T):
    """Weights from -0.5 to 2.5, of which some amplify, and keys of every length."""
    tokens = make_inputs(B, T, 2, 4, K, V, torch.float32, strong_decay=False)
    beta = 3 * tokens.beta - 0.5
    return tokens._replace(g=tokens.g / 32, beta=beta, k=tokens.k / 3)


def _norm_of_map(k, g, beta):
    """log2 of the norm of what tokens do to a state together."""
    product = torch.eye(K, dtype=torch.float64)
    for i in range(len(k)):
        product = product - beta[i] * torch.outer(product @ k[i], k[i])
        product *= g[i].exp()
    return torch.linalg.matrix_norm(product, 2).log2()


@pytest.mark.parametrize("has_norm", [False, True], ids=["keys", "l2norm"])
@pytest.mark.parametrize("lengths", [None, (130, 0, 97, 32)], ids=["batch", "packed"])
def test_a_chunk_keeps_no_more_than_is_said(lengths, has_norm, segments):
    B, T = (2, 200) if lengths is None else (1, sum(lengths))
    tokens = _tokens(B, T)
    bounds = None if lengths is None else cu_seqlens(lengths)
    split = segments.Split(1000, 2)
    kept = segments.bound_kept(tokens.k, 4, tokens.g, tokens.beta, bounds, has_norm, BT, split)
    k, g, beta = (x.double() for x in (tokens.k, tokens.g, tokens.beta))
    if has_norm:
        k = torch.nn.functional.normalize(k, dim=-1)
    # Row, first token and first place of each sequence.
    starts = [0, *torch.tensor(lengths or (T,)).cumsum(0).tolist()]
    rows = [(0, start, start // BT + n) for n, start in enumerate(starts[:-1])]
    if lengths is None:
        rows = [(b, 0, b * -(-T // BT)) for b in range(B)]
    seen = 0
    for (b, start, place), length in zip(rows, lengths or (T,) * B, strict=True):
        # Of two chunks all are among those that are looked at, but for the last segment's.
        for i in range(max(-(-length // (2 * BT)) - 1, 0) * 2):
            chunk = slice(start + i * BT, start + (i + 1) * BT)
            for h in range(4):
                x = _norm_of_map(k[b, chunk, h // 2], g[b, chunk, h], beta[b, chunk, h])
                assert x <= kept[place + i, h] + 1e-4
                seen += 1
    assert seen


def test_of_weights_up_to_one_the_bound_is_the_decay(segments):
    tokens = _tokens(1, 100)
    beta = torch.rand_like(tokens.beta)
    kept = segments.bound_kept(tokens.k, 4, tokens.g, beta, None, True, BT, segments.Split(1000, 1))
    expected = tokens.g[0, :96].double().unflatten(0, (3, BT)).sum(1) / torch.tensor(2.0).log()
    torch.testing.assert_close(kept[:3].double(), expected, atol=1e-5, rtol=1e-5)


@triton.jit
def all_forget_kernel(
    kept, out, T, B, chunks, HV: tl.constexpr, BT: tl.constexpr, LOOK: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    tl.store(out, all_forget(kept, T, B, chunks, HV, BT, -64.0, LOOK, BN).to(tl.int32))


@pytest.mark.parametrize("culprit", [None, (0, 3, 1), (1, 7, 0)])
def test_segments_forget_if_every_head_does_before_each(culprit, segments):
    """One head of one row does not before one segment, and then they do not."""
    B, chunks, ends, HV = 2, 5, 8, 3
    kept = torch.full((B, ends * chunks + 2, HV), -17.0)
    kept[:, :chunks] = 0.0  # LOOK is four, so of the first segment the last four count
    kept[:, 1:chunks] = -17.0
    kept[:, -2:] = torch.nan  # the last segment hands nothing on
    if culprit is not None:
        b, end, h = culprit
        kept[b, end * chunks - 2, h] = torch.nan if b else 0.0
    for BN in (4, 64):
        out = torch.full((1,), -1, dtype=torch.int32)
        sizes = {"HV": HV, "BT": BT, "LOOK": LOOK, "BN": BN}
        all_forget_kernel[(1,)](kept, out, (ends * chunks + 2) * BT, B, chunks, **sizes)
        assert out.item() == (culprit is None)
