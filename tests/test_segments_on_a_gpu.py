"""Prefills that are split into segments, on a GPU: of few heads, as a rank of several has."""

import functools

import oracle
import pytest
import torch
from inputs import cu_seqlens, indices, make_inputs, make_state
from tolerance import (
    assert_all_as_accurate_as_plain,
    assert_bitwise_equal,
    operands_of,
    witnesses,
)

import gdn_ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

H, HV, K, V = 1, 2, 128, 128
# More chunks than are looked at for what is forgotten.
T = 6000
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def split_into_segments(cuda, monkeypatch):
    """Segments of a dozen chunks, also of sequences for which that is not faster."""
    from gdn_ops.kernels import chunk, chunk_segments

    def split(has_maps):
        for module in (chunk, chunk_segments):
            monkeypatch.setattr(
                module, "choose", lambda *_, **__: chunk_segments.Split(8, 4, has_maps)
            )

    split(True)
    return split


def make_memories(T=T, seed=0):
    """Tokens that forget so little that the first segment is seen in the last."""
    sizes = (1, T, H, HV, K, V, DTYPE)
    tokens = make_inputs(*sizes, device="cuda", strong_decay=False, seed=seed)
    return tokens._replace(g=tokens.g / 1024)


@functools.cache
def packed_call():
    """The loop's results of packed sequences on slots, exact and with operands of 16 bit."""
    lengths = (2700, 0, 3100)
    tokens, pool = make_memories(), make_state(6, HV, V, K, device="cuda")
    slots, bounds = indices([4, 1, 2], device="cuda"), cu_seqlens(lengths, device="cuda")
    found = witnesses(
        oracle.delta_rule_into_pool,
        *(*tokens, pool, slots),
        cu_seqlens=bounds,
        operands=operands_of(gdn_ops.chunk_, DTYPE),
    )
    return (tokens, pool, slots, bounds), found


def _assert_only_the_slots_are_written(pool, before, slots):
    rest = [n for n in range(len(pool)) if n not in slots]
    assert_bitwise_equal(pool[rest], before[rest], "slots of no row")


@pytest.mark.parametrize("dynamic", [None, False, True], ids=["eager", "numbers", "symbols"])
def test_packed_segments_on_slots_are_as_accurate_as_the_loop(dynamic):
    (tokens, before, slots, bounds), found = packed_call()

    def prefill(*args):
        return gdn_ops.chunk_(*args)

    call = prefill
    if dynamic is not None:
        call = torch.compile(prefill, fullgraph=True, dynamic=dynamic)
    pool = before.clone()
    o = call(*tokens, pool, slots, None, bounds)
    assert_all_as_accurate_as_plain((o, pool), *found, terms=K, names=("o", "pool"))
    assert not o[:, 5800:].any()
    _assert_only_the_slots_are_written(pool, before, (4, 2))


@functools.cache
def batch_call(rates):
    """The same of a batch whose heads forget at these rates a token."""
    tokens = make_inputs(2, T, H, HV, K, V, DTYPE, device="cuda", strong_decay=False)
    tokens = tokens._replace(g=tokens.g / 1024 - torch.tensor(rates, device="cuda"))
    args = (*tokens, make_state(2, HV, V, K, device="cuda"))
    found = witnesses(oracle.delta_rule, *args, operands=operands_of(gdn_ops.chunk, DTYPE))
    return args, found


@pytest.mark.parametrize("has_maps", [False, True], ids=["early", "maps"])
@pytest.mark.parametrize(
    "rates",
    [(0.0, 0.0), (0.3, 0.0), (0.3, 0.2), (0.3, 0.008)],
    ids=["none", "one", "all", "one slowly"],
)
def test_segments_that_forget_are_as_accurate_as_the_loop(rates, has_maps, split_into_segments):
    from gdn_ops.kernels import chunk

    split_into_segments(has_maps)
    args, found = batch_call(rates)
    assert_all_as_accurate_as_plain(chunk.chunk(*args), *found, terms=K)


def test_whole_and_split_sequences_agree(monkeypatch):
    from gdn_ops.kernels import chunk
    from gdn_ops.kernels.chunk_segments import WHOLE

    tokens = make_memories()
    split = chunk.chunk(*tokens)
    monkeypatch.setattr(chunk, "choose", lambda *_, **__: WHOLE)
    for x, y in zip(split, chunk.chunk(*tokens), strict=True):
        assert (x - y).norm() <= 2**-7 * y.norm()


def test_one_code_serves_lengths_with_one_segment_and_with_many():
    compiled = torch.compile(gdn_ops.chunk, fullgraph=True, dynamic=True)
    for length in (3, 100, 769, 5000, T):
        tokens = make_memories(length)
        for x, y in zip(compiled(*tokens), gdn_ops.chunk(*tokens), strict=True):
            assert (x - y).norm() <= 2**-7 * y.norm()


def test_segments_are_captured_by_a_cuda_graph_and_repeat_their_bits():
    tokens, pool = make_memories(), make_state(3, HV, V, K, device="cuda")
    slots, start = indices([2], device="cuda"), pool.clone()
    expected = gdn_ops.chunk_(*tokens, pool, slots)
    after = pool.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gdn_ops.chunk_(*tokens, pool, slots)
    for _ in range(100):
        pool.copy_(start)
        graph.replay()
        assert_bitwise_equal(o, expected, "o")
        assert_bitwise_equal(pool, after, "pool")
