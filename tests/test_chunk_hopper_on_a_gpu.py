"""Kernels of a prefill for Hopper on its GPU: against the plain ones, and a loop over tokens."""

import functools
from unittest import mock

import oracle
import pytest
import torch
from inputs import cu_seqlens, indices, make_inputs, make_state, spread
from repeats import results_of_repeats
from tolerance import (
    assert_all_as_accurate_as_plain,
    assert_bitwise_equal,
    operands_of,
    witnesses,
)

import gdn_ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

H, HV, K, V = 1, 2, 128, 128
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Empty sequences first, between and last; then 30 tokens of padding.
LENGTHS, PADDING = (0, 70, 0, 129, 1, 0), 30


@pytest.fixture(autouse=True)
def is_served(cuda):
    """Other GPUs, and other versions of Triton, have the plain scan alone."""
    from gdn_ops.kernels.chunk_hopper import serves
    from gdn_ops.kernels.configs import gpu_at

    if not serves(K, V, gpu_at(0)):
        pytest.skip("needs sm_90 and the Gluon of a Triton that is known")


def prefilled_by(form, call):
    """The results of ``call`` by the scan with 1 or 2 warp groups, 0: the plain one, or fused.

    "beside" is the first with chunks that are prepared beside it.
    """
    from gdn_ops.kernels import chunk, chunk_hopper
    from gdn_ops.kernels.chunk_scan import scan_kernel

    own, used = chunk_hopper.pick_scan, []

    def pick(tiles, K, V, heads, gpu, *flags):
        if form == 0:
            return scan_kernel, tiles, {}
        heads = gpu.multiprocessors if form == 2 else 1
        used.append(own(tiles, K, V, heads, gpu, *flags))
        return used[-1]

    fused = mock.Mock(side_effect=chunk.launch_fused)
    with (
        mock.patch.object(chunk, "pick_scan", pick),
        mock.patch.object(chunk, "pick_limit", return_value=8 if form == "beside" else 0),
        mock.patch.object(chunk, "is_faster", return_value=form == "fused"),
        mock.patch.object(chunk, "launch_fused", fused),
    ):
        results = call()
    for kernel, tiles, options in used:
        assert (kernel.__name__, tiles.BV) == ("scan_hopper_kernel", 128 if form == 2 else 64)
        assert options["HAS_DONE"] == (form == "beside")
    assert bool(used) == (form in (1, 2, "beside"))
    assert fused.called == (form == "fused")
    return results


def assert_close(results, others):
    """Up to the rounding of products whose operands have 16 bits."""
    for x, y in zip(results, others, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert (x.float() - y.float()).norm() <= 2**-7 * y.float().norm()


def make_batch(B=2, T=200, dtype=BF16, state=FP32, **options):
    tokens = make_inputs(B, T, H, HV, K, V, dtype, device="cuda")
    initial = None if state is None else make_state(B, HV, V, K, state, device="cuda")
    return (*tokens, initial), options


def make_packed(state=FP32, **options):
    tokens = make_inputs(1, sum(LENGTHS) + PADDING, H, HV, K, V, BF16, device="cuda")
    initial = make_state(len(LENGTHS), HV, V, K, state, device="cuda")
    return (*tokens, initial, cu_seqlens(LENGTHS, device="cuda")), options


def make_alike(**options):
    """Chunks whose triangular matrices are far from the identity."""
    (q, k, v, g, _, initial), options = make_batch(**options)
    k = k[:, :1] + k / 8
    return (q, k, v, g / 64, torch.full_like(g, 0.99), initial), options


def make_without_gates():
    (q, k, v, _, _, initial), options = make_batch(use_qk_l2norm=True)
    return (q, k, v, None, None, initial), options


def make_strong_decays():
    """Sums of decays far beyond what float32 has an exponential of."""
    (q, k, v, g, beta, initial), options = make_batch(use_qk_l2norm=True)
    return (q, k, v, torch.where(torch.rand_like(g) < 0.1, -1e4, g), beta, initial), options


def make_strided_tokens():
    """Queries, keys and values as a convolution leaves them, and gates of 16 bits."""
    (q, k, v, g, beta, initial), options = make_batch(T=130, use_qk_l2norm=True)
    row = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
    q, k, v = (x.unflatten(-1, (-1, K)) for x in row.split([H * K, H * K, HV * V], -1))
    return (q, k, v, g.to(BF16), beta.to(BF16), initial), options


def make_strided():
    """States whose keys are not contiguous, among other numbers."""
    args, options = make_batch(T=65)
    initial = spread(args[5].mT.contiguous(), slot_gap=64, head_gap=32, offset=3)[0].mT
    assert initial.stride(3) != 1
    return (*args[:5], initial), options


ALIKE = "keys that are alike"
CASES = {
    **{f"T={T}": functools.partial(make_batch, T=T) for T in (1, 63, 64, 65, 200)},
    "norms": lambda: make_batch(use_qk_l2norm=True),
    "norms of one token": lambda: make_batch(T=1, use_qk_l2norm=True),
    ALIKE: lambda: make_alike(use_qk_l2norm=True),
    "no gates": make_without_gates,
    "strong decays": make_strong_decays,
    "strided tokens": make_strided_tokens,
    "scale": lambda: make_batch(T=65, scale=0.5),
    "no state": lambda: make_batch(state=None),
    "state bf16": lambda: make_batch(state=BF16),
    "state fp16": lambda: make_batch(state=FP16, use_qk_l2norm=True),
    "tokens fp16": lambda: make_batch(dtype=FP16),
    "strides": make_strided,
    "packed": make_packed,
    "packed with norms": lambda: make_packed(state=BF16, use_qk_l2norm=True),
}


@functools.cache
def expected_of(case):
    args, options = CASES[case]()
    operands = operands_of(gdn_ops.chunk, args[0].dtype)
    return args, options, witnesses(oracle.delta_rule, *args, operands=operands, **options)


FORMS = (1, 2, "fused", "beside")


@pytest.mark.parametrize(
    ("case", "form"),
    [(case, form) for case in CASES for form in FORMS if (case, form) != ("tokens fp16", "fused")],
)
def test_it_is_as_accurate_as_the_loop_and_agrees_with_the_plain_kernels(case, form):
    from gdn_ops.kernels import chunk

    args, options, found = expected_of(case)

    def call():
        return chunk.chunk(*args, **options)

    results = prefilled_by(form, call)
    assert_all_as_accurate_as_plain(results, *found, terms=K)
    if case != ALIKE:  # where both amplify what they round, each in its own way
        assert_close(results, prefilled_by(0, call))
    if len(args) > 6:
        assert not results[0][:, sum(LENGTHS) :].any()


# Slots that are written, and read: none, or none of the two, is no row. With a first slot.
POOLS = {
    "slots": ([4, -1, 1, 6, -1, 3], None, None),
    "reads": ([4, 5, 1, 6, -1, 3], [2, -1, 1, 0, 2, 3], None),
    "starts": ([4, 5, 1, 6, 2, 3], [2, 5, 1, -1, 0, 3], [True, False, True, True, False, True]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", POOLS)
def test_rows_without_a_slot_are_zero_and_pools_are_written_in_slots_alone(name, state, form):
    from gdn_ops.kernels import chunk

    slots, reads, starts = POOLS[name]
    tokens, bounds = make_packed()[0][:5], cu_seqlens(LENGTHS, device="cuda")
    before, _ = spread(make_state(8, HV, V, K, state, device="cuda"), slot_gap=128, head_gap=64)
    places = (
        indices(slots, device="cuda"),
        None if starts is None else torch.tensor(starts, device="cuda"),
        bounds,
        None if reads is None else indices(reads, device="cuda"),
    )
    found = witnesses(
        oracle.delta_rule_into_pool,
        *(*tokens, before, places[0], None, bounds, places[3]),
        has_initial_state=starts,
        operands=operands_of(gdn_ops.chunk_, BF16),
    )

    def call():
        pool, buffer = spread(before, slot_gap=128, head_gap=64)
        return chunk.chunk_(*tokens, pool, *places), pool, buffer

    o, pool, buffer = prefilled_by(form, call)
    assert_all_as_accurate_as_plain((o, pool), *found, terms=K, names=("o", "pool"))
    assert_close((o, pool), prefilled_by(0, call)[:2])
    # Slots of no live row, and what lies between slots.
    rest, untouched = spread(torch.ones_like(before), slot_gap=128, head_gap=64)
    start_of = slots if reads is None else reads
    rest[[w for w, r, n in zip(slots, start_of, LENGTHS, strict=True) if min(w, r) >= 0 and n]] = 0
    _, buffer_before = spread(before, slot_gap=128, head_gap=64)
    assert_bitwise_equal(buffer[untouched != 0], buffer_before[untouched != 0], "beside the slots")
    start = 0
    for n, length in enumerate(LENGTHS):
        if slots[n] < 0 or (reads is not None and reads[n] < 0):
            assert not o[:, start : start + length].any()
        start += length
    assert not o[:, start:].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_null_index_is_no_slot(form):
    from gdn_ops.kernels import chunk

    tokens = make_batch()[0][:5]
    before = make_state(3, HV, V, K, device="cuda")
    pool, slots = before.clone(), indices([0, 2], device="cuda")
    o = prefilled_by(form, lambda: chunk.chunk_(*tokens, pool, slots, null_index=0))
    assert not o[0].any()
    assert o[1].any()
    assert_bitwise_equal(pool[:2], before[:2], "pool")


@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("T", [520, 576])
@pytest.mark.parametrize("is_pool", [False, True], ids=["states", "pool"])
def test_segments_of_a_batch_agree_with_whole_sequences(T, form, is_pool, monkeypatch):
    from gdn_ops.kernels import chunk
    from gdn_ops.kernels.chunk_segments import Split

    args, options = make_batch(T=T, use_qk_l2norm=True)

    def call():
        if not is_pool:
            return chunk.chunk(*args, **options)
        pool, slots = args[5].clone(), indices([1, -1], device="cuda")
        return chunk.chunk_(*args[:5], pool, slots, **options), pool

    whole = prefilled_by(0, call)
    for has_maps in {True, is_pool}:
        monkeypatch.setattr(chunk, "choose", lambda *_, maps=has_maps, **__: Split(6, 1, maps))
        assert_close(prefilled_by(form, call), whole)
        assert_close(prefilled_by(0, call), whole)


@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("is_pool", [False, True], ids=["states", "pool"])
def test_segments_of_packed_sequences_agree_with_whole_ones(form, is_pool, monkeypatch):
    """So little is forgotten that what enters a segment is seen in its last token."""
    from gdn_ops.kernels import chunk, chunk_segments

    monkeypatch.setattr(chunk_segments, "LOOK", 16)
    lengths = (0, 1500, 64, 0, 1, 2000)
    tokens = make_inputs(1, sum(lengths) + PADDING, H, HV, K, V, BF16, device="cuda")
    tokens = tokens._replace(g=tokens.g / 4096)
    bounds = cu_seqlens(lengths, device="cuda")
    before = make_state(len(lengths), HV, V, K, device="cuda")

    def call():
        if not is_pool:
            return chunk.chunk(*tokens, before, bounds, use_qk_l2norm=True)
        pool, slots = before.clone(), indices([5, 1, 2, -1, 0, 4], device="cuda")
        return chunk.chunk_(*tokens, pool, slots, None, bounds, use_qk_l2norm=True), pool

    whole = prefilled_by(0, call)
    monkeypatch.setattr(chunk, "choose", lambda *_, **__: chunk_segments.Split(8, 1))
    assert_close(prefilled_by(form, call), whole)
    assert_close(prefilled_by(0, call), whole)


@pytest.mark.parametrize("form", FORMS)
def test_a_hundred_repeats_have_the_same_bits(form):
    from gdn_ops.kernels import chunk

    args, options = make_packed(use_qk_l2norm=True)

    def call():
        return [chunk.chunk(*args, **options) for _ in range(100)]

    first, *others = prefilled_by(form, call)
    for results in others:
        for x, y in zip(first, results, strict=True):
            assert_bitwise_equal(y, x)


# 36 sequences are too many for a multiprocessor for each 64 rows, two are not; 60 fill the GPU.
@pytest.mark.parametrize(("B", "form"), [(2, 1), (36, 2), (60, "fused")])
def test_plans_and_cuda_graphs_repeat_the_bits_of_the_first_call(B, form):
    from gdn_ops.kernels import chunk

    args, _ = make_batch(B, 65 + 3 * B)
    expected = prefilled_by(form, lambda: chunk.chunk(*args))
    for _ in range(4):  # the first is noted, the others repeat it
        for x, y in zip(gdn_ops.chunk(*args), expected, strict=True):
            assert_bitwise_equal(x, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = gdn_ops.chunk(*args)
    for _ in range(20):
        for x in results:
            x.zero_()
        graph.replay()
        for x, y in zip(results, expected, strict=True):
            assert_bitwise_equal(x, y)


@pytest.mark.parametrize(
    ("T", "rate"), [(4200, 0.0), (16500, 0.0), (16500, 0.1)], ids=["short", "long", "all forget"]
)
def test_chunks_prepared_beside_the_scan_give_the_bits_of_those_before_it(T, rate, monkeypatch):
    """Also where it is noted, captured, and where two streams have one each."""
    from gdn_ops.kernels import chunk

    tokens = make_inputs(1, T, 16, 32, K, V, BF16, device="cuda", strong_decay=False)
    tokens = tokens._replace(g=tokens.g / 4096 - rate)
    limit, choose = (mock.Mock(side_effect=x) for x in (chunk.pick_limit, chunk.choose))
    with mock.patch.multiple(chunk, pick_limit=limit, choose=choose):
        found = [chunk.chunk(*tokens)]
    assert chunk.pick_limit(*limit.call_args.args) > 0
    # Segments that forget begin with a state that is zero but for 2**-32 of what was before.
    split = chunk.choose(*choose.call_args.args, **choose.call_args.kwargs)
    found += results_of_repeats(lambda: gdn_ops.chunk(*tokens))
    monkeypatch.setattr(chunk, "pick_limit", lambda *_: 0)
    monkeypatch.setattr(chunk, "choose", lambda *_, **__: split)
    before = chunk.chunk(*tokens)
    for results in found:
        for x, y in zip(results, before, strict=True):
            assert_bitwise_equal(x, y)
