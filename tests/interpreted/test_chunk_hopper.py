"""The kernels of a prefill in Gluon, run on a CPU, against the float64 loop over tokens."""

import functools
from unittest import mock

import oracle
import pytest
import torch
from gluon_interpreter import interpreted
from inputs import cu_seqlens, indices, make_inputs, make_state
from tolerance import assert_all_as_accurate_as_plain, assert_bitwise_equal, witnesses

pytest.importorskip("triton")

H, HV, K, V, BF16 = 1, 2, 128, 128, torch.bfloat16
LENGTHS, PADDING = (0, 70, 64, 0, 1), 9


@pytest.fixture(params=[1, 2, "fused", "beside"])
def kernels(request, monkeypatch):
    """The launching functions, by a scan with 1 or 2 groups that walk, or in one kernel.

    "beside" is the first with chunks that say when they are prepared.
    """
    import triton.language as tl

    from gdn_ops.kernels import (
        chunk,
        chunk_carry_hopper,
        chunk_forget_hopper,
        chunk_fused_hopper,
        chunk_fused_inverse,
        chunk_fused_walk,
        chunk_hopper,
        chunk_prepare_beside,
        chunk_scan_hopper,
        chunk_scan_walk,
    )
    from gdn_ops.kernels.configs import Gpu

    if not chunk_hopper.has_gluon():
        pytest.skip("needs the Gluon of a Triton that is known")
    own = chunk_hopper.pick_scan
    is_fused = request.param == "fused"

    def pick(tiles, K, V, _heads, gpu, *flags):
        return own(tiles, K, V, gpu.multiprocessors if request.param == 2 else 1, gpu, *flags)

    monkeypatch.setattr(chunk, "_gpu_at", lambda _: Gpu("sm_90", 4, True))
    monkeypatch.setattr(chunk, "is_faster", lambda *_: is_fused)
    monkeypatch.setattr(chunk, "pick_scan", pick)
    # No kernel is started before the one before it is done.
    monkeypatch.setattr(chunk, "serves", lambda *_: False)
    monkeypatch.setattr(chunk, "pick_limit", lambda *_: 1 if request.param == "beside" else 0)
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: None)
    where = mock.Mock(side_effect=lambda: tl.to_tensor(where.call_count % 4))
    monkeypatch.setattr(chunk_prepare_beside, "multiprocessor", where)
    monkeypatch.setattr(chunk_prepare_beside, "release", lambda p_done: tl.store(p_done, 1))
    fused = (chunk_fused_hopper, chunk_fused_inverse, chunk_fused_walk)
    scan = (chunk_carry_hopper, chunk_forget_hopper, chunk_scan_hopper, chunk_scan_walk)
    with interpreted((*scan, *fused), monkeypatch) as launchers:
        yield chunk
    assert where.called == (request.param == "beside")
    assert launchers["fused_hopper_kernel" if is_fused else "scan_hopper_kernel"].calls


def _batch(B=1, T=130, state=torch.float32, **options):
    tokens = make_inputs(B, T, H, HV, K, V, BF16, beta_dtype=BF16, unit_keys=not options)
    return (*tokens, None if state is None else make_state(B, HV, V, K, state)), options


def _packed(**options):
    (*tokens, _), options = _batch(T=sum(LENGTHS) + PADDING, **options)
    return (*tokens, make_state(len(LENGTHS), HV, V, K), cu_seqlens(LENGTHS)), options


def _without_gates():
    args, options = _batch(**NORMS)
    return (*args[:3], None, None, args[5]), options


NORMS = {"use_qk_l2norm": True}
CASES = {
    "a token": lambda: _batch(T=1),
    "chunks": lambda: _batch(T=256, **NORMS),
    "a batch": lambda: _batch(B=2, T=70),
    "no state": lambda: _batch(state=None, **NORMS),
    "no gates": lambda: _without_gates(),
    "a state of 16 bits": lambda: _batch(state=BF16),
    "packed": _packed,
    "packed with norms": lambda: _packed(**NORMS),
}


@functools.cache
def _expected_of(case):
    args, options = CASES[case]()
    return args, options, witnesses(oracle.delta_rule, *args, operands=BF16, **options)


@pytest.mark.parametrize("case", CASES)
def test_it_is_as_accurate_as_the_loop_over_tokens(kernels, case):
    args, options, found = _expected_of(case)
    if len(args) > 6:
        # What is beside a sequence never leaks, and may be no number.
        args = [x.clone() for x in args]
        for x in args[:3]:
            x[:, sum(LENGTHS) :] = torch.nan
    results = kernels.chunk(*args, **options)
    assert_all_as_accurate_as_plain(results, *found, terms=K)


@pytest.mark.parametrize("kernels", ["beside"], indirect=True)
def test_chunks_are_prepared_where_no_multiprocessor_is_before_the_limit(kernels, monkeypatch):
    import triton.language as tl

    from gdn_ops.kernels import chunk_prepare_beside

    args, options = _batch(T=256)
    expected = kernels.chunk(*args, **options)
    far = mock.Mock(side_effect=lambda: tl.to_tensor(100))
    monkeypatch.setattr(chunk_prepare_beside, "multiprocessor", far)
    for x, y in zip(kernels.chunk(*args, **options), expected, strict=True):
        assert_bitwise_equal(x, y)
    assert far.called


def test_rows_without_a_slot_are_zero_and_other_slots_as_they_were(kernels):
    tokens, bounds = _packed()[0][:5], cu_seqlens(LENGTHS)
    before = make_state(7, HV, V, K)
    slots, reads = indices([4, -1, 1, 6, 2]), indices([2, 5, 1, 0, 2])
    starts = [True, True, False, True, True]
    found = witnesses(
        oracle.delta_rule_into_pool,
        *(*tokens, before, slots, None, bounds, reads),
        has_initial_state=starts,
        operands=BF16,
    )
    pool = before.clone()
    o = kernels.chunk_(*tokens, pool, slots, torch.tensor(starts), bounds, reads)
    assert_all_as_accurate_as_plain((o, pool), *found, terms=K, names=("o", "pool"))
    rest = [slot for slot in range(7) if slot not in (1, 2)]
    assert_bitwise_equal(pool[rest], before[rest], "pool")
    assert not o[:, : LENGTHS[1]].any()


@pytest.mark.parametrize("kernels", [1, 2], indirect=True)
@pytest.mark.parametrize("has_maps", [False, True], ids=["early", "maps"])
@pytest.mark.parametrize("rates", [(0.0, 0.2), (0.3, 0.2)], ids=["some forget", "all forget"])
def test_segments_agree_with_whole_sequences(rates, has_maps, kernels, monkeypatch):
    """Heads that forget do so in three of the chunks that are looked at, or in four."""
    from gdn_ops.kernels import chunk_segments
    from gdn_ops.kernels.chunk_segments import Split

    monkeypatch.setattr(chunk_segments, "LOOK", 4)
    args, options = _batch(B=2, T=700, **NORMS)
    args[3].mul_(1 / 64).sub_(torch.tensor(rates))
    whole = kernels.chunk(*args, **options)
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: Split(4, 1, has_maps))
    for x, y in zip(kernels.chunk(*args, **options), whole, strict=True):
        assert (x.float() - y.float()).norm() <= 2**-7 * y.float().norm()


@pytest.mark.parametrize("kernels", [1, 2], indirect=True)
@pytest.mark.parametrize("options", [{}, NORMS], ids=["as given", "norms"])
def test_segments_of_packed_sequences_agree_with_whole_ones(options, kernels, monkeypatch):
    """Of which some have no token, some less than a chunk, and some several segments.

    So little is forgotten that what enters a segment is seen in its last token.
    """
    from gdn_ops.kernels import chunk_segments

    monkeypatch.setattr(chunk_segments, "LOOK", 4)
    lengths = (0, 300, 64, 0, 1, 200)
    (*tokens, _), options = _batch(T=sum(lengths) + PADDING, **options)
    tokens[3] /= 1024
    args = (*tokens, make_state(len(lengths), HV, V, K), cu_seqlens(lengths))
    whole = kernels.chunk(*args, **options)
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: chunk_segments.Split(6, 1))
    for x, y in zip(kernels.chunk(*args, **options), whole, strict=True):
        assert (x.float() - y.float()).norm() <= 2**-7 * y.float().norm()


@pytest.mark.parametrize(
    ("sequences", "chunks", "heads", "arch", "limit"),
    [
        (1, 16, 32, "sm_90", 68),
        (1, 32, 16, "sm_90", 100),
        (1, 15, 32, "sm_90", 0),
        (2, 128, 16, "sm_90", 0),
        (1, 512, 64, "sm_90", 0),
        (1, 512, 32, "sm_100", 0),
    ],
)
def test_long_sequences_that_leave_half_of_an_h200_have_chunks_prepared_beside(
    sequences, chunks, heads, arch, limit
):
    from gdn_ops.kernels.chunk_beside import pick_limit
    from gdn_ops.kernels.chunk_hopper import has_gluon
    from gdn_ops.kernels.configs import Gpu

    found = pick_limit(sequences, chunks, heads, K, V, Gpu(arch, 132, True))
    assert found == (limit if has_gluon() else 0)
