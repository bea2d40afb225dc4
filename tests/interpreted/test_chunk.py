"""The chunk kernels in Triton's interpreter, against the float64 loop over tokens."""

import numpy as np
import oracle
import pytest
import tolerance
import torch
from chunk_witnesses import assert_equals_oracle, assert_updates_like_oracle, witnesses
from delta_rule_cases import OPTIONS, SHAPES, shape_call
from inputs import Shape, cu_seqlens, indices, make_inputs, make_state, spread
from tolerance import assert_all_as_accurate_as_plain, assert_bitwise_equal

from gdn_ops.kernels.configs import Gpu

H, HV, K, V = 2, 4, 16, 24
SLOTS = 7
LENGTHS = (3, 0, 66, 1, 10)
NOT_SERVED = [x for x in OPTIONS if x == "float64" or "per-channel" in x]


@pytest.fixture(scope="module", autouse=True)
def hidden_lanes_overflow():
    """Decays to tokens past the end of a sequence overflow in lanes that nothing reads."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


@pytest.fixture
def kernels():
    """Imported late: triton must find the environment that conftest.py sets."""
    from gdn_ops.kernels import chunk

    return chunk


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def kernels_of_a_device(kernels, monkeypatch, request):
    """The kernels as devices without and with tensor descriptors run them."""
    monkeypatch.setattr(kernels, "_gpu_at", lambda index: Gpu("interpreter", 1, request.param))
    return kernels


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_are_as_accurate_as_the_plain_loop(shape, kernels):
    assert_equals_oracle(kernels, shape_call(shape, torch.float32, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(B=2, T=65, H=2, HV=4, K=16, V=24),
        Shape(B=1, T=130, H=1, HV=1, K=100, V=64),
        Shape(B=1, T=66, H=1, HV=1, K=256, V=72),
        Shape(B=1, T=1, H=1, HV=3, K=64, V=128),
    ],
    ids=str,
)
def test_short_floats_are_as_accurate_as_a_loop_in_them(shape, dtype, kernels_of_a_device):
    assert_equals_oracle(kernels_of_a_device, shape_call(shape, dtype, "cpu"))


@pytest.mark.parametrize("case", [x for x in OPTIONS if x not in NOT_SERVED])
def test_every_option_means_what_the_oracle_says(case, kernels):
    assert_equals_oracle(kernels, OPTIONS[case]("cpu"))


@pytest.mark.parametrize("case", NOT_SERVED)
def test_what_the_kernels_do_not_serve_has_a_reason(case, kernels):
    args, options = OPTIONS[case]("cpu")
    assert "kernels" in kernels.supports(*args, **options)


@pytest.mark.parametrize("use_qk_l2norm", [False, True], ids=["", "l2norm"])
@pytest.mark.parametrize("lengths", [LENGTHS, (0, 20, 20, 33, 0)], ids=str)
def test_packed_sequences_equal_the_loop(lengths, use_qk_l2norm, kernels_of_a_device):
    """Bounds that are no multiples of anything, tokens after the last that are NaN."""
    tokens = make_inputs(1, sum(lengths) + 5, H, HV, K, V, torch.float16)
    states, bounds = make_state(len(lengths), HV, V, K), cu_seqlens(lengths)
    options = {"use_qk_l2norm": use_qk_l2norm}
    exact, plain = witnesses(oracle.delta_rule, torch.float16, *tokens, states, bounds, **options)
    for x in tokens:
        x[:, sum(lengths) :] = torch.nan
    actual = kernels_of_a_device.chunk(*tokens, states, bounds, **options)
    assert_all_as_accurate_as_plain(actual, exact, plain, terms=K)
    empty = [n for n, length in enumerate(lengths) if length == 0]
    assert_bitwise_equal(actual[1][empty], states[empty])


def test_more_sequences_than_are_searched_at_once_equal_the_loop(kernels, monkeypatch):
    from gdn_ops.kernels import chunk_prepared

    monkeypatch.setattr(chunk_prepared, "PREPARE_BN", 4)
    lengths = (1, 0, 2, 3, 0, 0, 4, 1, 17, 0, 2)
    tokens = make_inputs(1, sum(lengths) + 2, 1, 1, K, V)
    call = (*tokens, make_state(len(lengths), 1, V, K), cu_seqlens(lengths, torch.int64))
    assert_equals_oracle(kernels, (call, {}))


@pytest.mark.parametrize(
    ("BT", "dtype"),
    [(16, torch.float32), (32, torch.float32), (64, torch.float16), (64, torch.bfloat16)],
    ids=str,
)
def test_keys_that_are_all_alike_lose_no_digits(BT, dtype, kernels, monkeypatch):
    """The inverse of a chunk is then ones beside the diagonal, its powers are in the thousands.

    Chunks of the lengths that each dtype has.
    """
    monkeypatch.setattr(kernels, "pick", lambda *_: kernels.Tiles(BT, 32, 16, 4, 1))
    tokens = make_inputs(1, 70, 1, 1, 20, 7, dtype)
    tokens.k[:] = tokens.k[:, :1].clone()
    assert_equals_oracle(kernels, ((*tokens._replace(g=None, beta=None),), {}))


@pytest.mark.parametrize("beta", [0.99, 0.83], ids=str)
def test_one_write_strength_for_keys_that_are_alike_loses_no_digits(beta, kernels):
    """Rounded with it, all rows of the inverse would be off alike, and outputs by their sum."""
    q, k, v, g, _ = make_inputs(1, 200, 1, 2, 128, 128, torch.bfloat16)
    tokens = (q, k[:, :1] + k / 8, v, g / 64, torch.full_like(g, beta))
    options = {"use_qk_l2norm": True}
    found = tolerance.witnesses(oracle.delta_rule, *tokens, operands=q.dtype, **options)
    exact, plain = (results[0] for results in found)
    o = kernels.chunk(*tokens, **options)[0]
    tolerance.assert_as_accurate_as_plain(o, exact, plain, terms=128, name="o")


@pytest.mark.parametrize("g", [-100.0, -1e4, -torch.inf])
def test_decay_at_every_token_leaves_only_that_token(g, kernels_of_a_device):
    tokens = make_inputs(1, 66, 1, 2, K, 8, torch.float16)
    tokens = tokens._replace(g=torch.full_like(tokens.g, g), beta=None)
    assert_equals_oracle(kernels_of_a_device, ((*tokens, make_state(1, 2, 8, K)), {}))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_rows_update_their_slots_alone(state_dtype, index_dtype, kernels):
    tokens = make_inputs(1, sum(LENGTHS), H, HV, K, V)
    pool = make_state(SLOTS, HV, V, K, state_dtype)
    slots, bounds = indices([6, 1, 0, 4, 2], index_dtype), cu_seqlens(LENGTHS)
    _, untouched = assert_updates_like_oracle(kernels, tokens, pool, slots, cu_seqlens=bounds)
    # Slot 1 is that of the empty sequence, slots 3 and 5 are those of none.
    assert untouched.tolist() == [False, True, False, True, False, True, False]


@pytest.mark.parametrize(("null_index", "slots"), [(-1, [-1, 3, -7, 1]), (2, [2, 3, 1, 4])])
def test_padding_rows_are_zero_and_touch_no_state(slots, null_index, kernels_of_a_device):
    """Rows 0 and 2 are padding; their tokens are NaN, so whoever computes with them is seen."""
    tokens = make_inputs(4, 9, H, HV, K, V, torch.float16)
    for x in tokens:
        x[[0, 2]] = torch.nan
    pool = make_state(SLOTS, HV, V, K)
    o, _ = assert_updates_like_oracle(
        kernels_of_a_device, tokens, pool, indices(slots), torch.float16, null_index=null_index
    )
    assert_bitwise_equal(o[[0, 2]], torch.zeros_like(o[[0, 2]]))


def test_padding_between_packed_rows_does_not_leak(kernels_of_a_device):
    tokens = make_inputs(1, sum(LENGTHS) + 3, H, HV, K, V, torch.float16)
    for x in tokens:
        x[:, 3:69] = torch.nan
    slots, bounds = indices([6, 1, -1, 4, 2]), cu_seqlens(LENGTHS)
    assert_updates_like_oracle(
        kernels_of_a_device,
        tokens,
        make_state(SLOTS, HV, V, K),
        slots,
        torch.float16,
        cu_seqlens=bounds,
    )


def test_a_slot_is_read_only_where_there_is_an_initial_state(kernels):
    tokens = make_inputs(3, 35, H, HV, K, V)
    pool = make_state(SLOTS, HV, V, K)
    has = torch.tensor([True, False, True])
    assert_updates_like_oracle(kernels, tokens, pool, indices([5, 0, 3]), has_initial_state=has)
    pool[0] = torch.nan
    o = kernels.chunk_(*tokens, pool, indices([5, 0, 3]), has)
    assert o.isfinite().all()
    assert pool.isfinite().all()


def test_the_slot_read_may_be_another_than_the_slot_written(kernels):
    tokens, pool = make_inputs(3, 35, H, HV, K, V), make_state(SLOTS, HV, V, K)
    read = indices([1, 0, -1])
    assert_updates_like_oracle(kernels, tokens, pool, indices([5, 0, 3]), read_indices=read)


@pytest.mark.parametrize("slots", [None, [4, 2]], ids=["None", "scattered"])
@pytest.mark.parametrize("gaps", [(12, 0, 5), (31, 3, 2)], ids=str)
def test_slots_and_heads_may_lie_anywhere(gaps, slots, kernels):
    tokens, values = make_inputs(2, 35, H, HV, K, V), make_state(5, HV, V, K)
    slots = None if slots is None else indices(slots)
    dense = values.clone()
    expected = kernels.chunk_(*tokens, dense, slots)
    pool, buffer = spread(values, *gaps)
    is_gap = torch.ones_like(buffer, dtype=torch.bool)
    is_gap.as_strided(pool.shape, pool.stride(), pool.storage_offset()).fill_(False)
    assert_bitwise_equal(kernels.chunk_(*tokens, pool, slots), expected, "o")
    assert_bitwise_equal(pool, dense, "pool")
    assert (buffer[is_gap] == -7777.0).all()


def test_rows_of_odd_strides_equal_the_same_rows_alone(kernels_of_a_device):
    """Bounds, slots and flags that are columns of other tensors; tokens that need pointers."""
    tokens = make_inputs(1, sum(LENGTHS), H, HV, K, V, torch.float16)
    pool, other = make_state(SLOTS, HV, V, K), make_state(SLOTS, HV, V, K)
    has = torch.tensor([True, True, False, True, True])
    rows = (indices([6, 1, 0, 4, 2]), has, cu_seqlens(LENGTHS), indices([6, 1, 0, 5, 2]))
    expected = kernels_of_a_device.chunk_(*tokens, pool, *rows)
    odd = [torch.stack([x, torch.zeros_like(x)], 1)[:, 0] for x in rows]
    shifted = tokens.map(lambda x: torch.cat([x[..., :1], x], -1)[..., 1:])
    assert_bitwise_equal(kernels_of_a_device.chunk_(*shifted, other, *odd), expected, "o")
    assert_bitwise_equal(other, pool, "pool")
