"""``causal_conv1d`` against the float64 loop, ``F.conv1d`` and Hugging Face's function."""

import hf_witness
import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
import torch.nn.functional as F
from inputs import cu_seqlens, generator, make_convolution
from tolerance import (
    assert_all_as_accurate_as_plain,
    assert_all_equal_up_to_rounding,
    assert_bitwise_equal,
    witnesses,
)

from gdn_ops import causal_conv1d

LENGTHS = (3, 0, 40, 1, 66)
activations = pytest.mark.parametrize("activation", [None, "silu"])


def _history(N, D, W, dtype=torch.float32, device="cpu"):
    return torch.randn(N, D, W - 1, generator=generator(1)).to(device, dtype)


def _assert_equals_oracle(*args, **options):
    exact, plain = witnesses(oracle.convolution, *args, **options)
    actual = causal_conv1d(*args, **options)
    assert_all_as_accurate_as_plain(actual, exact, plain, terms=args[1].shape[1])


def _assert_all_bitwise_equal(actual, expected):
    for x, y, name in zip(actual, expected, ("y", "state"), strict=True):
        assert_bitwise_equal(x, y, name)


def _assert_same(actual, expected, *args, activation):
    """The same multiply-adds give the same bits, but where the exponential of silu falls on a
    vector of the processor or on its remainder, it may differ in the last place.
    """
    if activation is None:
        _assert_all_bitwise_equal(actual, expected)
    else:
        limits = witnesses(oracle.convolution, *args, activation=activation)
        assert_all_equal_up_to_rounding(actual, expected, *limits, terms=args[1].shape[1])


@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("B", "T", "D", "W"),
    [(1, 1, 1, 2), (2, 1, 8, 4), (2, 2, 24, 4), (3, 64, 7, 3), (1, 65, 40, 4), (2, 130, 16, 5)],
)
def test_convolution_is_as_accurate_as_the_plain_loop(B, T, D, W, dtype, activation, device):
    x, weight, bias = make_convolution(B, T, D, W, dtype, device=device)
    state = _history(B, D, W, device=device)
    _assert_equals_oracle(x, weight, bias, state, activation=activation)


@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, None], ids=["float32", "dtype-of-x"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_every_dtype_and_option_means_what_the_oracle_says(
    with_bias, parameter_dtype, state_dtype, dtype, activation, device
):
    x, weight, bias = make_convolution(2, 9, 8, 4, dtype, device=device)
    weight, bias = (p.to(parameter_dtype or dtype) for p in (weight, bias))
    state = None if state_dtype is None else _history(2, 8, 4, state_dtype, device)
    _assert_equals_oracle(x, weight, bias if with_bias else None, state, activation=activation)


@pytest.mark.parametrize("T", [1, 2, 3, 9])
def test_float64_inputs_are_computed_in_float64(T, device):
    x, weight, bias = make_convolution(2, T, 8, 4, torch.float64, device=device)
    state = _history(2, 8, 4, torch.float64, device)
    _assert_equals_oracle(x, weight, bias, state, activation="silu")


@activations
@pytest.mark.parametrize("T", [1, 3, 70])
def test_convolution_equals_the_function_of_hugging_face(T, activation, device):
    x, weight, bias = make_convolution(2, T, 12, 4, torch.float64, device=device)
    y, final = causal_conv1d(x, weight, bias, activation=activation)
    expected = hf_witness.causal_conv1d(x, weight, bias, activation)
    # Its caller keeps the inputs before the activation, zeros where there are none.
    kept = F.pad(x.mT, (3, 0))[..., -3:].cpu()
    hf_witness.assert_same_function((y, final), (expected, kept))


@activations
def test_one_step_equals_the_update_of_hugging_face(activation, device):
    x, weight, bias = make_convolution(2, 1, 12, 4, torch.float64, device=device)
    state = _history(2, 12, 4, torch.float64, device)
    actual = causal_conv1d(x, weight, bias, state, activation=activation)
    expected = hf_witness.causal_conv1d_update(x, state, weight, bias, activation)
    hf_witness.assert_same_function(actual, expected)


@pytest.mark.parametrize("W", [2, 3, 4, 7])
def test_the_history_stands_before_the_first_input(W, device):
    """As ``F.conv1d`` without padding computes it over both."""
    x, weight, bias = make_convolution(2, 11, 6, W, torch.float64, device=device)
    state = _history(2, 6, W, torch.float64, device)
    columns = torch.cat([state, x.mT], 2)
    expected = F.conv1d(columns, weight[:, None], bias, groups=6).mT
    actual = causal_conv1d(x, weight, bias, state)
    hf_witness.assert_same_function(actual, (expected.cpu(), columns[..., 1 - W :].cpu()))


@activations
def test_packed_equals_separate(activation, device):
    x, weight, bias = make_convolution(1, sum(LENGTHS), 24, 4, device=device)
    state = _history(len(LENGTHS), 24, 4, device=device)
    bounds = cu_seqlens(LENGTHS, device=device)
    y, final = causal_conv1d(x, weight, bias, state, bounds, activation=activation)
    for n, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if start == end:
            continue
        args = x[:, start:end], weight, bias, state[n : n + 1]
        alone = causal_conv1d(*args, activation=activation)
        packed = y[:, start:end], final[n : n + 1]
        _assert_same(packed, alone, *args, activation=activation)


@activations
@pytest.mark.parametrize("split", [1, 2, 3, 17, 35])
def test_two_segments_equal_one(split, activation, device):
    x, weight, bias = make_convolution(2, 36, 24, 4, device=device)
    state = _history(2, 24, 4, device=device)
    first, middle = causal_conv1d(x[:, :split], weight, bias, state, activation=activation)
    second, final = causal_conv1d(x[:, split:], weight, bias, middle, activation=activation)
    args = x, weight, bias, state
    whole = causal_conv1d(*args, activation=activation)
    _assert_same((torch.cat([first, second], 1), final), whole, *args, activation=activation)


def test_a_long_sequence_equals_its_pieces(device):
    """More inputs than are convolved at a time: the pieces meet without a seam."""
    x, weight, bias = make_convolution(1, 300, 4096, 4, device=device)
    y, final = causal_conv1d(x, weight, bias)
    state, parts = None, []
    for part in x.split(50, 1):
        piece, state = causal_conv1d(part, weight, bias, state)
        parts.append(piece)
    limits = witnesses(oracle.convolution, x, weight, bias)
    names = ("y", "state")
    pieces = (torch.cat(parts, 1), state)
    assert_all_equal_up_to_rounding((y, final), pieces, *limits, terms=4, names=names)


def test_the_order_of_the_batch_does_not_matter(device):
    x, weight, bias = make_convolution(5, 9, 24, 4, device=device)
    state = _history(5, 24, 4, device=device)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    y, final = causal_conv1d(x, weight, bias, state)
    moved = causal_conv1d(x[order], weight, bias, state[order])
    _assert_all_bitwise_equal(moved, (y[order], final[order]))


def test_padding_never_leaks_and_gives_zero(device):
    used = sum(LENGTHS)
    x, weight, bias = make_convolution(1, used + 5, 24, 4, device=device)
    x[:, used:] = torch.nan
    bounds = cu_seqlens(LENGTHS, device=device)
    y, final = causal_conv1d(x, weight, bias, None, bounds)
    expected = causal_conv1d(x[:, :used], weight, bias, None, bounds)
    _assert_all_bitwise_equal((y[:, :used], final), expected)
    assert_bitwise_equal(y[:, used:], torch.zeros_like(y[:, used:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_empty_sequence_returns_its_initial_state(dtype, device):
    x, weight, bias = make_convolution(1, 4, 24, 4, device=device)
    state = _history(4, 24, 4, dtype, device)
    bounds = cu_seqlens([0, 4, 0, 0], device=device)
    empty = torch.tensor([0, 2, 3], device=device)
    _, final = causal_conv1d(x, weight, bias, state, bounds)
    assert_bitwise_equal(final[empty], state[empty])
    _, from_zero = causal_conv1d(x, weight, bias, None, bounds)
    assert_bitwise_equal(from_zero[empty], torch.zeros_like(from_zero[empty]))


def test_strides_of_the_inputs_do_not_matter(device):
    x, weight, bias = make_convolution(2, 9, 24, 4, device=device)
    state = _history(2, 24, 4, device=device)
    expected = causal_conv1d(x, weight, bias, state)
    strided = (
        x.mT.contiguous().mT,
        weight.mT.contiguous().mT,
        torch.stack([bias, bias], 1)[:, 1],
        state.mT.contiguous().mT,
    )
    actual = causal_conv1d(*strided)
    _assert_all_bitwise_equal(actual, expected)
    assert all(result.is_contiguous() for result in actual)


@pytest.mark.parametrize("T", [1, 2, 9])
def test_inputs_are_not_modified_and_the_results_are_new(T, device):
    x, weight, bias = make_convolution(2, T, 24, 4, device=device)
    given = (x, weight, bias, _history(2, 24, 4, device=device))
    before = [t.clone() for t in given]
    results = causal_conv1d(*given, activation="silu")
    again = causal_conv1d(*given, activation="silu")
    _assert_all_bitwise_equal(results, again)
    for t, old in zip(given, before, strict=True):
        assert_bitwise_equal(t, old)
    storages = {t.untyped_storage().data_ptr() for t in given}
    assert storages.isdisjoint(t.untyped_storage().data_ptr() for t in results)


def test_what_is_left_out_has_its_neutral_value(device):
    x, weight, bias = make_convolution(2, 9, 24, 4, device=device)
    zeros = torch.zeros_like(_history(2, 24, 4, device=device))
    _assert_all_bitwise_equal(
        causal_conv1d(x, weight), causal_conv1d(x, weight, torch.zeros_like(bias), zeros)
    )


@activations
@hypothesis.given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    slack=st.integers(0, 3),
    W=st.integers(2, 5),
    given_state=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_packing_equals_the_oracle(activation, lengths, slack, W, given_state, seed):
    x, weight, bias = make_convolution(1, max(1, sum(lengths) + slack), 6, W, seed=seed)
    state = _history(len(lengths), 6, W) if given_state else None
    _assert_equals_oracle(x, weight, bias, state, cu_seqlens(lengths), activation=activation)
