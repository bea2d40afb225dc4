"""Whether sequences are walked in segments, and what is generated where they are."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from launches_to_compile import integers, new

import gdn_ops
from gdn_ops.kernels import chunk_hopper
from gdn_ops.kernels.chunk_hopper import has_gluon
from gdn_ops.kernels.chunk_segments import Split, choose
from gdn_ops.kernels.configs import Gpu, cdiv
from lowering.fake_gpu import generate

H200 = Gpu("sm_90", 132, True)
BF16, K, V, BT = torch.bfloat16, 128, 128, 64
on_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def _split(N, T, HV, gpu=H200, dtype=BF16, BK=128, BV=64, needs_maps=False, is_beside=False):
    sizes = (N, N * cdiv(T, BT), HV, V, BK, BV, dtype, gpu)
    return choose(*sizes, needs_maps=needs_maps, is_beside=is_beside)


def _segments(*args, **options):
    return _split(*args, **options).SEGMENTS


def test_long_sequences_of_few_heads_are_split_and_no_others():
    assert [_segments(1, 8192, HV) for HV in (4, 8, 16, 32, 64)] == [16, 8, 4, 1, 1]
    assert [_segments(1, T, 4) for T in (1, 1024, 2048, 2**20)] == [1, 1, 1, 16]
    assert [_segments(1, T, 32) for T in (8192, 16384, 32768)] == [1, 1, 1]
    assert [_segments(N, 8192, 8) for N in (1, 2, 4, 8, 64)] == [8, 8, 1, 1, 1]


@pytest.mark.skipif(not has_gluon(), reason="needs the Gluon of a Triton that is known")
def test_few_segments_have_no_maps_where_whole_sequences_are_prepared_beside_the_scan():
    sizes = ((8192, 32), (16384, 32), (32768, 32), (8192, 16), (32768, 16), (8192, 8))
    splits = [_split(1, T, HV, is_beside=True) for T, HV in sizes]
    assert [x.SEGMENTS for x in splits] == [1, 2, 2, 4, 4, 8]
    assert [x.has_maps for x in splits] == [False] * 4 + [True] * 2
    assert _segments(1, 8192, 16, needs_maps=True, is_beside=True) == 1


def test_what_the_kernels_of_segments_do_not_serve_is_not_split():
    assert _segments(1, 8192, 4, dtype=torch.float32) == 1
    assert _segments(1, 8192, 4, BK=256) == 1
    assert _segments(1, 8192, 4, gpu=H200._replace(multiprocessors=1)) == 1


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    rest=st.integers(0, 99),
    segments=st.integers(2, 40),
    least=st.integers(1, 5),
)
def test_packed_sequences_have_places_for_all_their_segments(lengths, rest, segments, least):
    """The places of a sequence are its own, and end where those of the next begin."""
    T, N, split = sum(lengths) + rest, len(lengths), Split(segments, least)
    tokens = max(cdiv(cdiv(T, BT), segments), least) * BT
    starts = [sum(lengths[:n]) for n in range(N + 1)]
    first = [start // tokens + n for n, start in enumerate(starts)]
    assert all(
        b - a >= max(1, cdiv(length, tokens))
        for a, b, length in zip(first[:-1], first[1:], lengths, strict=True)
    )
    # And of the last, of which nothing follows.
    assert first[-2] + max(1, cdiv(lengths[-1], tokens)) <= split.places(T, 1, BT, N)


def _tokens(B, T, HV=4):
    q, k = new(B, T, 2, K), new(B, T, 2, K)
    return q, k, new(B, T, HV, V), new(B, T, HV, dtype=torch.float32), new(B, T, HV)


def _stages(module):
    """Names of the kernels, as a reader of the code meets them."""
    names = [launch.kernel.name.removeprefix("triton_tem_fused_") for launch in module.launches]
    return [name.rpartition("_")[0] for name in names]


@on_no_gpu
def test_a_long_prefill_has_a_kernel_for_each_stage_and_says_so(caplog):
    with caplog.at_level(logging.DEBUG, "lowering"):
        (module,) = generate(gdn_ops.chunk, _tokens(1, 8192))
    assert _stages(module) == ["chunk_prepare", "carry_chunk", "chain_chunk", "chunk_scan"]
    assert "gdn_chunk_scan: sequences are walked in up to 16 segments" in caplog.messages


@on_no_gpu
@pytest.mark.parametrize(("B", "T", "HV"), [(1, 500, 4), (8, 8192, 16)])
def test_a_prefill_that_is_not_split_has_two_templates(B, T, HV, monkeypatch):
    monkeypatch.setattr(chunk_hopper, "GLUON", ())  # else there may be one call
    (module,) = generate(gdn_ops.chunk, _tokens(B, T, HV))
    assert _stages(module) == ["chunk_prepare", "chunk_scan"]


@on_no_gpu
def test_code_for_every_length_is_split_though_its_first_tokens_are_few():
    """And the segments are counted in the grid, by the length of each call."""
    (module,) = generate(gdn_ops.chunk, _tokens(2, 100), dynamic=True)
    assert len(module.launches) == 4
    assert "max(12, " in module.code


@on_no_gpu
def test_code_for_every_packing_is_split_and_reads_no_bound_on_the_host():
    def prefill(*args):
        return gdn_ops.chunk_(*args)

    pool, slots = new(9, 4, V, K, dtype=torch.float32), integers(3)
    (module,) = generate(prefill, (*_tokens(1, 100), pool, slots, None, integers(4)), dynamic=True)
    assert len(module.launches) == 4
    assert ".item()" not in module.code


@on_no_gpu
@pytest.mark.skipif(not has_gluon(), reason="needs the Gluon of a Triton that is known")
@pytest.mark.parametrize(("T", "is_call"), [(8192, False), (32768, True)])
def test_packed_sequences_of_many_tokens_are_a_call_of_what_is_in_gluon(T, is_call, caplog):
    def prefill(*args):
        return gdn_ops.chunk_(*args)

    pool, slots = new(9, 4, V, K, dtype=torch.float32), integers(1)
    with caplog.at_level(logging.DEBUG, "lowering"):
        (module,) = generate(prefill, (*_tokens(1, T), pool, slots, None, integers(2)))
    assert len(module.launches) == (0 if is_call else 4)
    said = "gdn_chunk: stays a call of the operator: its kernels in Gluon are faster"
    assert (said in caplog.messages) == is_call
