"""Sequences that the kernels split into segments, against the float64 loop over tokens."""

import pytest
import torch
from chunk_witnesses import assert_equals_oracle, assert_updates_like_oracle
from inputs import cu_seqlens, indices, make_inputs, make_state
from tolerance import assert_bitwise_equal

from gdn_ops.kernels.configs import Gpu

H, HV, K, V = 1, 2, 16, 24
SLOTS = 7
# Of 32 tokens, and of all lengths beside them.
LENGTHS = (3, 0, 66, 1, 32, 97, 64)


@pytest.fixture(params=[False, True], ids=["early", "maps"])
def split_into(monkeypatch, request):
    """Splits calls that follow, in either way; pools in the one that serves them.

    Four chunks are looked at, so that there are more.
    """
    from gdn_ops.kernels import chunk, chunk_segments
    from gdn_ops.kernels.chunk_segments import Split

    monkeypatch.setattr(chunk_segments, "LOOK", 4)

    def split_into(segments, least):
        def choose(*_, needs_maps, **__):
            return Split(segments, least, request.param or needs_maps)

        monkeypatch.setattr(chunk, "choose", choose)

    return split_into


@pytest.fixture
def kernels(split_into):
    """Segments of one chunk, so that a few tokens are several."""
    from gdn_ops.kernels import chunk

    split_into(1000, 1)
    return chunk


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def kernels_of_a_device(kernels, monkeypatch, request):
    """The kernels as devices without and with tensor descriptors run them."""
    monkeypatch.setattr(kernels, "_gpu_at", lambda index: Gpu("interpreter", 1, request.param))
    return kernels


def make_memories(B, T, dtype=torch.float32, V=V, K=K):
    """Tokens that forget so little that the first segment is seen in the last."""
    tokens = make_inputs(B, T, H, HV, K, V, dtype, strong_decay=False)
    return tokens._replace(g=tokens.g / 32)


@pytest.mark.parametrize("use_qk_l2norm", [False, True], ids=["", "l2norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_segments_equal_the_loop(dtype, use_qk_l2norm, kernels_of_a_device):
    call = (*make_memories(2, 200, dtype), make_state(2, HV, V, K))
    assert_equals_oracle(kernels_of_a_device, (call, {"use_qk_l2norm": use_qk_l2norm}))


@pytest.mark.parametrize(("segments", "least"), [(2, 1), (3, 2), (1000, 3)])
def test_segments_of_every_length_equal_the_loop(segments, least, kernels, split_into):
    """Of two, three and more chunks, the last shorter than the others or of one token."""
    split_into(segments, least)
    assert_equals_oracle(kernels, ((*make_memories(1, 193), make_state(1, HV, V, K)), {}))
    packed = (*make_memories(1, sum(LENGTHS)), make_state(len(LENGTHS), HV, V, K))
    assert_equals_oracle(kernels, ((*packed, cu_seqlens(LENGTHS)), {}))


def test_segments_without_an_initial_state_begin_with_none(kernels):
    assert_equals_oracle(kernels, (make_memories(2, 130), {"scale": 0.3}))


@pytest.mark.parametrize("use_qk_l2norm", [False, True], ids=["", "l2norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rates", [(0.5, 0.0), (0.5, 0.25)], ids=["some", "all"])
def test_segments_that_forget_equal_the_loop(
    rates, dtype, use_qk_l2norm, kernels_of_a_device, split_into
):
    """Each head in another chunk, the last one in the first case never."""
    split_into(4, 1)
    tokens = make_memories(2, 900, dtype)
    tokens = tokens._replace(g=tokens.g - torch.tensor(rates))
    call = (*tokens, make_state(2, HV, V, K))
    assert_equals_oracle(kernels_of_a_device, (call, {"use_qk_l2norm": use_qk_l2norm}))


def test_what_all_heads_forget_no_segment_reads(kernels_of_a_device, split_into):
    split_into(2, 1)
    tokens = make_memories(1, 640)
    tokens.v[:, 3] = torch.nan
    for rates, is_forgotten in (((0.6, 0.5), True), ((0.5, 0.0), False)):
        kept = tokens._replace(g=tokens.g - torch.tensor(rates))
        o, final = kernels_of_a_device.chunk(*kept)
        assert o[:, 3:320].isnan().any()
        for x in (o[:, 320:, 1], final[:, 1]):
            assert x.isfinite().all() if is_forgotten else x.isnan().any()


@pytest.mark.parametrize("use_qk_l2norm", [False, True], ids=["keys", "l2norm"])
def test_a_memory_that_tokens_amplify_is_not_forgotten(use_qk_l2norm, kernels, split_into):
    """Gates alone would leave 2**-180 of it: 1 - beta |k|^2 is -1.5 for the keys of all tokens."""
    split_into(2, 1)
    tokens = make_memories(1, 600)
    tokens.k[:] = torch.nn.functional.normalize(tokens.k[:, :1], dim=-1)
    tokens.v[:, 300:] = 0
    tokens = tokens._replace(g=torch.full_like(tokens.g, -0.42), beta=tokens.beta * 0 + 2.5)
    if not use_qk_l2norm:
        tokens = tokens._replace(k=tokens.k * 2.5**0.5, beta=None)
    assert_equals_oracle(kernels, ((*tokens,), {"use_qk_l2norm": use_qk_l2norm}))


@pytest.mark.parametrize(("K", "V"), [(100, 72), (16, 8), (128, 40)])
def test_keys_and_values_of_every_size_equal_the_loop(K, V, kernels_of_a_device):
    tokens = make_memories(1, 150, torch.float16, V, K)
    assert_equals_oracle(kernels_of_a_device, ((*tokens, make_state(1, HV, V, K)), {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_packed_segments_equal_the_loop(dtype, kernels_of_a_device):
    tokens = make_memories(1, sum(LENGTHS), dtype)
    call = (*tokens, make_state(len(LENGTHS), HV, V, K), cu_seqlens(LENGTHS, torch.int64))
    assert_equals_oracle(kernels_of_a_device, (call, {}))


def test_tokens_past_the_last_packed_sequence_are_zero_and_seen_by_nobody(kernels_of_a_device):
    tokens, bounds = make_memories(1, sum(LENGTHS) + 70, torch.float16), cu_seqlens(LENGTHS)
    states = make_state(len(LENGTHS), HV, V, K)
    alone = tokens.rows(slice(None), slice(sum(LENGTHS)))
    expected = kernels_of_a_device.chunk(*alone, states, bounds)
    for x in tokens:
        x[:, sum(LENGTHS) :] = torch.nan
    o, final_state = kernels_of_a_device.chunk(*tokens, states, bounds)
    assert_bitwise_equal(o[:, : sum(LENGTHS)], expected[0], "o")
    assert_bitwise_equal(final_state, expected[1], "final_state")
    assert (o[:, sum(LENGTHS) :] == 0).all()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_segments_update_the_slots_of_their_sequences_alone(state_dtype, kernels):
    pool, slots = make_state(SLOTS, HV, V, K, state_dtype), indices([6, 1, 0, 4, 2, -1, 3])
    _, untouched = assert_updates_like_oracle(
        kernels, make_memories(1, sum(LENGTHS)), pool, slots, cu_seqlens=cu_seqlens(LENGTHS)
    )
    # Slot 1 is that of the empty sequence, slot 5 that of none.
    assert untouched.tolist() == [False, True, False, False, False, True, False]


def test_a_slot_is_read_where_another_or_none_is_to_be(kernels):
    has, read = torch.tensor([True, False, True]), indices([1, 0, -1])
    rows = indices([5, 0, 3])
    for options in ({"has_initial_state": has}, {"read_indices": read}):
        pool = make_state(SLOTS, HV, V, K)
        assert_updates_like_oracle(kernels, make_memories(3, 100), pool, rows, **options)


def test_rows_of_padding_are_zero_and_touch_no_state(kernels_of_a_device):
    tokens = make_memories(3, 100, torch.float16)
    for x in tokens:
        x[1] = torch.nan
    pool = make_state(SLOTS, HV, V, K)
    o, _ = assert_updates_like_oracle(
        kernels_of_a_device, tokens, pool, indices([4, -1, 2]), torch.float16
    )
    assert (o[1] == 0).all()
