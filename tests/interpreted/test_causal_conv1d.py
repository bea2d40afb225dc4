"""The convolution's kernels in Triton's interpreter against the float64 loop over tokens."""

import oracle
import pytest
import torch
from autograd_oracle import assert_equals_autograd, gradients_of
from inputs import cu_seqlens, generator, indices, make_convolution, spread
from tolerance import (
    assert_all_as_accurate_as_plain,
    assert_as_accurate_as_plain,
    assert_bitwise_equal,
    witnesses,
)

from gdn_ops.kernels.causal_conv1d import causal_conv1d, causal_conv1d_, supports
from gdn_ops.kernels.causal_conv1d_backward import causal_conv1d_backward

D, W = 20, 4
LENGTHS = (3, 0, 33, 1, 2)
NAMES = ("x", "weight", "bias", "initial_state")
# NumPy warns where the exponential of silu overflows to infinity, as it does on a GPU.
overflows = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")


def _history(N, D=D, W=W, S=1, dtype=torch.float32):
    return torch.randn(N, D, W - 1 + S - 1, generator=generator(1)).to(dtype)


def _channel_major(x):
    return x.mT.contiguous().mT


def _assert_equals_oracle(*args, **options):
    exact, plain = witnesses(oracle.convolution, *args, **options)
    actual = causal_conv1d(*args, **options)
    assert_all_as_accurate_as_plain(actual, exact, plain, terms=args[1].shape[1])
    assert all(x.is_contiguous() for x in actual)
    return actual


def _assert_updates_like_oracle(x, weight, bias, pool, *args, **options):
    """Outputs and the whole pool: a pool only holds inputs, so it must be the same bits."""
    exact, plain = witnesses(oracle.convolution_into_pool, x, weight, bias, pool, *args, **options)
    y = causal_conv1d_(x, weight, bias, pool, *args, **options)
    assert_as_accurate_as_plain(y, exact[0], plain[0], terms=weight.shape[1], name="y")
    assert_bitwise_equal(pool, exact[1].to(pool.dtype), "pool")
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.activation = activation
        return causal_conv1d(*inputs, activation=activation)

    @staticmethod
    def backward(ctx, *upstream):
        inputs = ctx.saved_tensors
        gradients = causal_conv1d_backward(*upstream, *inputs, activation=ctx.activation)
        present = [None if x is None else g for g, x in zip(gradients, inputs, strict=False)]
        return None, *present, *[None] * (len(inputs) - len(present))


def _differentiable(*inputs, activation=None):
    return _Convolution.apply(activation, *inputs)


def _assert_gradients(tensors, *args, **options):
    x, weight = tensors[:2]
    terms = max(weight.shape[1], x.shape[0] * x.shape[1])  # a tap meets every token
    assert_equals_autograd(
        _differentiable, oracle.convolution, NAMES, tensors, *args, terms=terms, **options
    )


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        (torch.float32, None),
        (torch.float32, "silu"),
        (torch.bfloat16, "silu"),
        (torch.float16, None),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("B", "T", "D", "W"),
    [(1, 1, 1, 2), (2, 1, 8, 4), (2, 2, 70, 4), (1, 33, 7, 3), (1, 17, 20, 4), (1, 35, 8, 7)],
)
def test_convolution_is_as_accurate_as_the_plain_loop(B, T, D, W, activation, dtype):
    x, weight, bias = make_convolution(B, T, D, W, dtype)
    _assert_equals_oracle(x, weight, bias, _history(B, D, W), activation=activation)


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_every_option_means_what_the_oracle_says(with_bias, parameter_dtype, state_dtype):
    x, weight, bias = make_convolution(2, 9, D, W, torch.bfloat16)
    weight, bias = weight.to(parameter_dtype), bias.to(parameter_dtype) if with_bias else None
    state = None if state_dtype is None else _history(2, dtype=state_dtype)
    _assert_equals_oracle(x, weight, bias, state, activation="silu")


@pytest.mark.parametrize("layout", [_channel_major, torch.Tensor.contiguous], ids=["td", "dt"])
@pytest.mark.parametrize("with_state", [False, True], ids=["", "state"])
def test_packed_rows_equal_the_oracle(with_state, layout):
    """Empty sequences hand their state on; tokens of no sequence, here NaN, give zero."""
    used = sum(LENGTHS)
    x, weight, bias = make_convolution(1, used + 18, D, W)
    bounds = cu_seqlens(LENGTHS, torch.int64 if with_state else torch.int32)
    state = _history(len(LENGTHS)) if with_state else None
    y, _ = _assert_equals_oracle(layout(x), weight, bias, state, bounds, activation="silu")
    x[:, used:] = torch.nan
    again, _ = causal_conv1d(layout(x), weight, bias, state, bounds, activation="silu")
    assert_bitwise_equal(again, y)
    assert not y[:, used:].any()


@pytest.mark.parametrize("lengths", [(0, 0, 5), (16, 16, 0, 0), (1,) * 9, (31, 2)], ids=str)
def test_every_block_of_packed_rows_has_a_program(lengths):
    x, weight, bias = make_convolution(1, sum(lengths), 4, W)
    _assert_equals_oracle(x, weight, bias, _history(len(lengths), 4), cu_seqlens(lengths))
    _assert_gradients((x, weight, bias, _history(len(lengths), 4)), cu_seqlens(lengths))


@pytest.mark.parametrize("T", [1, 3, 40])
def test_strides_do_not_matter(T):
    x, weight, bias = make_convolution(2, T, D, W)
    state = _history(2)
    expected = causal_conv1d(x, weight, bias, state)
    strided = (
        _channel_major(x),
        weight.mT.contiguous().mT,
        torch.stack([bias, bias], 1)[:, 1],
        state.mT.contiguous().mT,
    )
    for actual, y in zip(causal_conv1d(*strided), expected, strict=True):
        assert_bitwise_equal(actual, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("S", [1, 3])
def test_a_pool_of_any_dtype_equals_the_oracle(S, dtype):
    """With ``S > 1`` the plain update keeps the first columns and leaves the others alone."""
    x, weight, bias = make_convolution(1, sum(LENGTHS) + 2, D, W)
    pool, slots = _history(7, S=S, dtype=dtype), indices([6, 1, 0, 4, 2])
    _assert_updates_like_oracle(x, weight, bias, pool, slots, None, cu_seqlens(LENGTHS))


@pytest.mark.parametrize("T", [1, 2, 18])
@pytest.mark.parametrize("layout", ["", "gaps", "channels innermost"])
def test_slots_and_channels_may_lie_anywhere(layout, T):
    x, weight, bias = make_convolution(2, T, D, W)
    pool = _history(5, S=2)
    if layout == "gaps":
        pool, buffer = spread(pool, 31, 3, 2)
        is_gap = torch.ones_like(buffer, dtype=torch.bool)
        is_gap.as_strided(pool.shape, pool.stride(), pool.storage_offset()).fill_(False)
    elif layout:
        pool = pool.mT.contiguous().mT
    _assert_updates_like_oracle(x, weight, bias, pool, indices([4, 0]), activation="silu")
    assert layout != "gaps" or (buffer[is_gap] == -7777.0).all()


@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("null_index", "slots"), [(-1, [-1, 3, -9, 0]), (0, [0, 3, -1, 1]), (0, None)]
)
def test_padding_rows_are_zero_and_touch_no_state(slots, null_index, index_dtype, verify):
    """The inputs of padding are NaN, so whoever computes with them is seen."""
    x, weight, bias = make_convolution(4, 2, D, W)
    padding = [0] if slots is None else [0, 2]
    x[padding] = torch.nan
    pool = _history(5, S=3)
    slots = None if slots is None else indices(slots, index_dtype)
    accepted = indices([1, 3, 1, 2], index_dtype) if verify else None
    args = (x, weight, bias, pool, slots, accepted)
    y = _assert_updates_like_oracle(*args, null_index=null_index)
    assert not y[padding].any()


@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
def test_an_empty_sequence_leaves_its_slot_as_it_is(verify):
    x, weight, bias = make_convolution(1, 2, D, W)
    pool = _history(5, S=3)
    pool[3].view(torch.int32).fill_(0x7FC12345)
    before = pool.clone()
    accepted = indices([2, 1, 3]) if verify else None
    causal_conv1d_(x, weight, bias, pool, indices([3, 1, 4]), accepted, cu_seqlens([0, 2, 0]))
    assert_bitwise_equal(pool[[3, 4]], before[[3, 4]])
    assert not torch.equal(pool[1], before[1])


@pytest.mark.parametrize("width", [2, 3, 4, 6])
@pytest.mark.parametrize("T", [1, 2, 4])
def test_verify_reads_behind_the_accepted_tokens_and_keeps_all_inputs(T, width):
    x, weight, bias = make_convolution(4, T, D, width)
    pool, accepted = _history(6, W=width, S=4), indices([1, 4, 2, 3])
    args = (x, weight, bias, pool, indices([5, 0, 3, 1]), accepted)
    _assert_updates_like_oracle(*args, activation="silu")


def test_decode_verify_empty_and_padding_rows_share_one_launch():
    """Rows 4 to 6 are padding: no slot, an accepted count outside 1 to S, more tokens than S."""
    x, weight, bias = make_convolution(1, 18, D, W)
    lengths, S = [1, 4, 0, 2, 1, 1, 5], 4
    pool, alone = _history(8, S=S), _history(8, S=S)
    slots, accepted = indices([5, 2, 0, 3, -1, 1, 4]), indices([3, 1, 2, 4, 1, 5, 1])
    y = causal_conv1d_(x, weight, bias, pool, slots, accepted, cu_seqlens(lengths))
    live = (x[:, :7], weight, bias, alone, slots[:4], accepted[:4], cu_seqlens(lengths[:4]))
    expected = _assert_updates_like_oracle(*live)
    assert_bitwise_equal(y[:, :7], expected, "y")
    assert_bitwise_equal(pool, alone, "pool")
    assert not y[:, 7:].any()


@pytest.mark.parametrize("seed", range(3))
def test_a_verify_loop_equals_convolving_the_accepted_tokens_bit_for_bit(seed):
    """Each step a row verifies some tokens, of which the first are the ones that are accepted."""
    S, steps = 3, 4
    draw = generator(seed)
    true, weight, bias = make_convolution(1, steps * S, D, W, seed=1)
    wrong, _, _ = make_convolution(1, steps * S, D, W, seed=2)
    pool = _history(1, S=S)
    history, kept, done, accepted = pool[..., : W - 1].clone(), [], 0, 1
    for _ in range(steps):
        L = int(torch.randint(1, S + 1, (), generator=draw))
        now = int(torch.randint(1, L + 1, (), generator=draw))
        x = torch.cat([true[:, done : done + now], wrong[:, now:L]], 1)
        kept.append(causal_conv1d_(x, weight, bias, pool, None, indices([accepted]))[:, :now])
        done, accepted = done + now, now
    expected, final = causal_conv1d(true[:, :done], weight, bias, history)
    assert_bitwise_equal(torch.cat(kept, 1), expected, "y")
    assert_bitwise_equal(pool[..., accepted - 1 : accepted + W - 2], final, "state")


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [2, 4, 5, 9])
@pytest.mark.parametrize("T", [1, 3, 15])
def test_gradients_equal_autograd_through_the_loop(T, width, activation):
    tensors = (*make_convolution(2, T, D, width), _history(2, W=width))
    _assert_gradients(tensors, activation=activation)


@pytest.mark.parametrize("missing", ["bias", "initial_state"])
def test_gradients_where_an_argument_is_missing(missing):
    tensors = dict(zip(NAMES, (*make_convolution(2, 9, D, W), _history(2)), strict=True))
    tensors[missing] = None
    _assert_gradients(tuple(tensors.values()), activation="silu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameter_dtype", [None, torch.float32], ids=["dtype-of-x", "float32"])
def test_gradients_have_the_dtypes_of_what_they_belong_to(parameter_dtype, dtype):
    x, *parameters = make_convolution(2, 9, D, W, dtype)
    parameters = [p.to(parameter_dtype or dtype) for p in parameters]
    _assert_gradients((x, *parameters, _history(2)), activation="silu")


def test_gradients_of_packed_rows_are_the_same_every_time_and_zero_past_the_last():
    x, weight, bias = make_convolution(1, sum(LENGTHS) + 18, D, W)
    x[:, sum(LENGTHS) :] = torch.nan
    tensors, bounds = (x, weight, bias, _history(len(LENGTHS))), cu_seqlens(LENGTHS)
    gradients = gradients_of(_differentiable, tensors, bounds, activation="silu")
    assert not gradients[0][:, sum(LENGTHS) :].any()
    again = gradients_of(_differentiable, tensors, bounds, activation="silu")
    for name, one, other in zip(NAMES, gradients, again, strict=True):
        assert one.isfinite().all(), name
        assert_bitwise_equal(one, other, name)
    _assert_gradients((x.nan_to_num(), *tensors[1:]), bounds, activation="silu")


def test_strides_of_what_gradients_are_made_of_do_not_matter():
    x, weight, bias = make_convolution(2, 9, D, W)
    given = (torch.ones_like(x), _history(2), x, weight, bias, _history(2))
    expected = causal_conv1d_backward(*given, activation="silu")
    strided = (
        torch.ones(()).expand(x.shape),
        given[1].mT.contiguous().mT,
        _channel_major(x),
        weight.mT.contiguous().mT,
        torch.stack([bias, bias], 1)[:, 1],
        given[5].mT.contiguous().mT,
    )
    actual = causal_conv1d_backward(*strided, activation="silu")
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        assert_bitwise_equal(one, other, name)
        assert one.is_contiguous(), name


@overflows
def test_silu_is_finite_far_from_zero():
    x, weight, bias = make_convolution(1, 9, D, W)
    y, _ = causal_conv1d(1e4 * x, weight, bias, activation="silu")
    assert y.isfinite().all()
    tensors = (1e4 * x, weight, bias, _history(1))
    gradients = gradients_of(_differentiable, tensors, activation="silu")
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_float64_is_not_served():
    assert "float64" in supports(torch.zeros(1, 1, 1, dtype=torch.float64))
    assert supports(torch.zeros(1, 1, 1)) is None
