"""``causal_conv1d_`` on a pool: decode, prefill, verify, and nothing written elsewhere."""

import hf_witness
import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from inputs import cu_seqlens, generator, indices, make_convolution, spread
from tolerance import assert_as_accurate_as_plain, assert_bitwise_equal, witnesses

from gdn_ops import causal_conv1d, causal_conv1d_

D, W = 24, 4
LENGTHS = (3, 0, 40, 1, 2)
index_dtypes = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)


def _pool(slots, S=1, dtype=torch.float32, device="cpu", width=W):
    values = torch.randn(slots, D, width - 1 + S - 1, generator=generator(1))
    return values.to(device, dtype)


def _convolution(B, T, device="cpu", dtype=torch.float32, seed=0):
    return make_convolution(B, T, D, W, dtype, device=device, seed=seed)


def _assert_updates_like_oracle(x, weight, bias, pool, *args, **options):
    """Outputs and the whole pool: a pool only holds inputs, so it must be the same bits."""
    exact, plain = witnesses(oracle.convolution_into_pool, x, weight, bias, pool, *args, **options)
    y = causal_conv1d_(x, weight, bias, pool, *args, **options)
    assert_as_accurate_as_plain(y, exact[0], plain[0], terms=weight.shape[1], name="y")
    assert_bitwise_equal(pool.cpu(), exact[1].to(pool.dtype), "pool")
    return y


@index_dtypes
@pytest.mark.parametrize("T", [1, 2, 3, 9])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_pool_equals_the_functional_form(activation, T, index_dtype, device):
    x, weight, bias = _convolution(3, T, device)
    pool, slots = _pool(7, device=device), indices([5, 0, 3], index_dtype, device)
    expected_y, final = causal_conv1d(x, weight, bias, pool[slots], activation=activation)
    expected = pool.index_copy(0, slots.long(), final)
    y = causal_conv1d_(x, weight, bias, pool, slots, activation=activation)
    assert_bitwise_equal(y, expected_y, "y")
    assert_bitwise_equal(pool, expected, "pool")


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("T", [1, 3])
def test_a_pool_equals_the_update_of_hugging_face(T, activation, device):
    x, weight, bias = _convolution(2, T, device, torch.float64)
    pool = _pool(2, dtype=torch.float64, device=device)
    expected = hf_witness.causal_conv1d_update(x, pool, weight, bias, activation)
    y = causal_conv1d_(x, weight, bias, pool, activation=activation)
    hf_witness.assert_same_function((y, pool), expected)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("S", [1, 3])
def test_packed_rows_of_any_length_and_dtype_equal_the_oracle(S, dtype, state_dtype, device):
    """With ``S > 1`` the plain update keeps the first columns and leaves the others alone."""
    x, weight, bias = _convolution(1, sum(LENGTHS) + 2, device, dtype)
    pool = _pool(7, S, state_dtype, device)
    slots, bounds = indices([6, 1, 0, 4, 2], device=device), cu_seqlens(LENGTHS, device=device)
    y = _assert_updates_like_oracle(x, weight, bias, pool, slots, None, bounds)
    assert_bitwise_equal(y[:, -2:], torch.zeros_like(y[:, -2:]), "y of no sequence")


@pytest.mark.parametrize("slots", [None, [4, 2], [0, 1]], ids=["None", "scattered", "first"])
@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
@pytest.mark.parametrize("gaps", [(0, 0, 0), (12, 0, 5), (0, 8, 0), (31, 3, 2)], ids=str)
def test_slots_and_channels_may_lie_anywhere(gaps, verify, slots, device):
    x, weight, bias = _convolution(2, 2, device)
    dense = _pool(5, 3, device=device)
    pool, buffer = spread(dense, *gaps)
    is_gap = torch.ones_like(buffer, dtype=torch.bool)
    is_gap.as_strided(pool.shape, pool.stride(), pool.storage_offset()).fill_(False)
    args = (
        None if slots is None else indices(slots, device=device),
        indices([3, 1], device=device) if verify else None,
    )
    expected = causal_conv1d_(x, weight, bias, dense, *args)
    assert_bitwise_equal(causal_conv1d_(x, weight, bias, pool, *args), expected, "y")
    assert_bitwise_equal(pool, dense, "pool")
    assert (buffer[is_gap] == -7777.0).all()


def test_a_pool_may_have_its_channels_innermost(device):
    x, weight, bias = _convolution(2, 2, device)
    dense, slots = _pool(5, device=device), indices([4, 2], device=device)
    pool = dense.mT.contiguous().mT
    expected = causal_conv1d_(x, weight, bias, dense, slots)
    assert_bitwise_equal(causal_conv1d_(x, weight, bias, pool, slots), expected, "y")
    assert_bitwise_equal(pool, dense, "pool")


@index_dtypes
@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
@pytest.mark.parametrize(
    ("null_index", "slots"), [(-1, [-1, 3, -9, 0]), (0, [0, 3, -1, 1]), (2, [2, 3, 1, 4])]
)
def test_padding_rows_are_zero_and_touch_no_state(slots, null_index, verify, index_dtype, device):
    """Rows 0 and 2 are padding; their inputs are NaN, so whoever computes with them is seen."""
    x, weight, bias = _convolution(4, 2, device)
    x[[0, 2]] = torch.nan
    pool = _pool(5, 3, device=device)
    alone, live = pool.clone(), torch.tensor([1, 3], device=device)
    accepted = indices([1, 3, 1, 2], index_dtype, device) if verify else None
    slots = indices(slots, index_dtype, device)
    y = causal_conv1d_(x, weight, bias, pool, slots, accepted, null_index=null_index)
    accepted = accepted[live] if verify else None
    expected = causal_conv1d_(x[live], weight, bias, alone, slots[live], accepted)
    assert_bitwise_equal(y[live], expected, "y")
    assert_bitwise_equal(y[[0, 2]], torch.zeros_like(y[[0, 2]]), "y of padding")
    assert_bitwise_equal(pool, alone, "pool")


@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
def test_an_empty_sequence_leaves_its_slot_as_it_is(verify, device):
    x, weight, bias = _convolution(1, 2, device)
    pool = _pool(5, 3, device=device)
    pool[3].view(torch.int32).fill_(0x7FC12345)
    before = pool.clone()
    slots, bounds = indices([3, 1, 4], device=device), cu_seqlens([0, 2, 0], device=device)
    accepted = indices([2, 1, 3], device=device) if verify else None
    causal_conv1d_(x, weight, bias, pool, slots, accepted, bounds)
    assert_bitwise_equal(pool[[3, 4]], before[[3, 4]])
    assert not torch.equal(pool[1], before[1])


@index_dtypes
@pytest.mark.parametrize("width", [2, 3, 4, 6])
@pytest.mark.parametrize("T", [1, 2, 4])
def test_verify_reads_behind_the_accepted_tokens_and_keeps_all_inputs(
    T, width, index_dtype, device
):
    S = 4
    x, weight, bias = make_convolution(4, T, D, width, device=device)
    pool = _pool(6, S, device=device, width=width)
    slots = indices([5, 0, 3, 1], index_dtype, device)
    accepted = indices([1, 4, 2, 3], index_dtype, device)
    _assert_updates_like_oracle(x, weight, bias, pool, slots, accepted, activation="silu")


@pytest.mark.parametrize("accepted", [-3, 0, 4, 100])
def test_an_accepted_count_outside_1_to_S_makes_the_row_padding(accepted, device):
    x, weight, bias = _convolution(2, 2, device)
    pool = _pool(2, 3, device=device)
    counts = indices([accepted, 3], device=device)
    y = _assert_updates_like_oracle(x, weight, bias, pool, None, counts)
    assert not y[0].any()
    assert y[1].all()


def test_more_tokens_than_S_make_a_verify_row_padding(device):
    x, weight, bias = _convolution(1, 6, device)
    pool = _pool(2, 2, device=device)
    alone = pool.clone()
    bounds, counts = cu_seqlens([4, 2], device=device), indices([1, 2], device=device)
    y = causal_conv1d_(x, weight, bias, pool, None, counts, bounds)
    slot = indices([1], device=device)
    expected = causal_conv1d_(x[:, 4:], weight, bias, alone, slot, counts[1:])
    assert_bitwise_equal(y[:, 4:], expected, "y")
    assert_bitwise_equal(y[:, :4], torch.zeros_like(y[:, :4]), "y of padding")
    assert_bitwise_equal(pool, alone, "pool")


def test_decode_verify_empty_and_padding_rows_share_one_launch(device):
    x, weight, bias = _convolution(1, 12, device)
    pool = _pool(6, 4, device=device)
    slots = indices([5, 2, 0, 3, -1], device=device)
    accepted = indices([3, 1, 2, 4, 1], device=device)
    bounds = cu_seqlens([1, 4, 0, 2, 3], device=device)
    y = _assert_updates_like_oracle(x, weight, bias, pool, slots, accepted, bounds)
    assert_bitwise_equal(y[:, 7:], torch.zeros_like(y[:, 7:]), "y of padding")


def test_prefill_is_where_a_verify_with_one_accepted_token_goes_on(device):
    x, weight, bias = _convolution(2, 12, device)
    pool, S = _pool(2, 3, device=device), 3
    expected = causal_conv1d(x, weight, bias, pool[..., : W - 1])[0]
    prefill = causal_conv1d_(x[:, : 12 - S], weight, bias, pool)
    ones = indices([1, 1], device=device)
    verify = causal_conv1d_(x[:, 12 - S :], weight, bias, pool, None, ones)
    assert_bitwise_equal(torch.cat([prefill, verify], 1), expected)


def test_only_the_pool_is_modified_and_the_output_is_new(device):
    x, weight, bias = _convolution(2, 2, device)
    pool = _pool(5, 3, device=device)
    slots, accepted = indices([1, 4], device=device), indices([2, 3], device=device)
    given = (x, weight, bias, slots, accepted)
    before = [t.clone() for t in given]
    y = causal_conv1d_(x, weight, bias, pool, slots, accepted, activation="silu")
    assert all(torch.equal(t, old) for t, old in zip(given, before, strict=True))
    assert y.is_contiguous()
    storages = {t.untyped_storage().data_ptr() for t in (*given, pool)}
    assert y.untyped_storage().data_ptr() not in storages


@hypothesis.given(
    data=st.data(), rows=st.integers(1, 3), S=st.integers(1, 4), width=st.integers(2, 5)
)
def test_a_verify_loop_equals_convolving_the_accepted_tokens_bit_for_bit(data, rows, S, width):
    """Each step a row verifies some tokens, of which the first are the ones that are accepted."""
    steps = data.draw(st.integers(1, 5))
    true, weight, bias = make_convolution(rows, steps * S, D, width, seed=1)
    wrong, _, _ = make_convolution(rows, steps * S, D, width, seed=2)
    pool = _pool(rows, S, width=width)
    history = pool[..., : width - 1].clone()
    done, accepted = [0] * rows, [1] * rows
    kept = [[] for _ in range(rows)]
    for _ in range(steps):
        lengths = [data.draw(st.integers(0, S)) for _ in range(rows)]
        now = [data.draw(st.integers(1, L)) if L else 0 for L in lengths]
        if sum(lengths) == 0:
            continue
        parts = [
            piece[row : row + 1, done[row] + a : done[row] + b]
            for row in range(rows)
            for piece, a, b in ((true, 0, now[row]), (wrong, now[row], lengths[row]))
        ]
        bounds = cu_seqlens(lengths)
        x = torch.cat(parts, 1)
        y = causal_conv1d_(x, weight, bias, pool, None, indices(accepted), bounds)
        for row in range(rows):
            start = int(bounds[row])
            kept[row].append(y[:, start : start + now[row]])
            done[row] += now[row]
            accepted[row] = now[row] or accepted[row]
    for row in range(rows):
        if not done[row]:
            continue
        x, before = true[row : row + 1, : done[row]], history[row : row + 1]
        expected, final = causal_conv1d(x, weight, bias, before)
        assert_bitwise_equal(torch.cat(kept[row], 1), expected, f"y of row {row}")
        first = accepted[row] - 1
        assert_bitwise_equal(pool[row : row + 1, :, first : first + width - 1], final, "state")
