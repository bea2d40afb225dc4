"""What holds for ``chunk`` and ``recurrent`` alike, whatever the numbers are."""

import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from delta_rule_cases import assert_equals_oracle
from inputs import cu_seqlens, make_inputs, make_state
from tolerance import assert_all_equal_up_to_rounding, assert_bitwise_equal, witnesses

import gdn_ops

pytestmark = pytest.mark.usefixtures("form")

H, HV, K, V = 2, 4, 16, 24
LENGTHS = (3, 0, 40, 1, 66)

operators = pytest.mark.parametrize(
    "operator", [gdn_ops.chunk, gdn_ops.recurrent], ids=["chunk", "recurrent"]
)


def _inputs(B, T, device, **options):
    return make_inputs(B, T, H, HV, K, V, device=device, **options)


def _states(N, device, dtype=torch.float32):
    return make_state(N, HV, V, K, dtype, device=device)


def _assert_all_bitwise_equal(actual, expected):
    for x, y, name in zip(actual, expected, ("o", "state"), strict=True):
        assert_bitwise_equal(x, y, name)


@operators
@pytest.mark.parametrize("kda", [False, True], ids=["", "kda"])
def test_packed_equals_separate(operator, kda, device):
    tokens = _inputs(1, sum(LENGTHS), device, kda=kda)
    states = _states(len(LENGTHS), device)
    bounds = cu_seqlens(LENGTHS, device=device)
    o, final = operator(*tokens, states, bounds)
    for n, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if start == end:
            continue
        alone = operator(*tokens.rows(slice(None), slice(start, end)), states[n : n + 1])
        _assert_all_bitwise_equal((o[:, start:end], final[n : n + 1]), alone)


@operators
def test_batch_equals_the_same_sequences_packed(operator, device):
    B, T = 3, 35
    tokens, states = _inputs(B, T, device), _states(B, device)
    packed = tokens.map(lambda x: x.flatten(0, 1)[None])
    packed_o, packed_final = operator(*packed, states, cu_seqlens([T] * B, device=device))
    o, final = operator(*tokens, states)
    _assert_all_bitwise_equal((packed_o.view_as(o), packed_final), (o, final))


@operators
def test_the_order_of_the_batch_does_not_matter(operator, device):
    tokens, states = _inputs(5, 35, device), _states(5, device)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    o, final = operator(*tokens, states)
    moved = operator(*tokens.rows(order), states[order])
    _assert_all_bitwise_equal(moved, (o[order], final[order]))


@operators
def test_a_row_does_not_depend_on_its_neighbours(operator, device):
    tokens, states = _inputs(3, 35, device), _states(3, device)
    o, final = operator(*tokens, states)
    for x in (*tokens, states):
        x[1] = torch.nan
    others = torch.tensor([0, 2], device=device)
    poisoned_o, poisoned_final = operator(*tokens, states)
    _assert_all_bitwise_equal(
        (poisoned_o[others], poisoned_final[others]), (o[others], final[others])
    )


@operators
def test_padding_never_leaks_and_gives_zero(operator, device):
    """Tokens past ``cu_seqlens[-1]`` belong to no sequence, whatever they hold."""
    used = sum(LENGTHS)
    tokens, states = _inputs(1, used + 7, device), _states(len(LENGTHS), device)
    for x in tokens:
        x[:, used:] = torch.nan
    bounds = cu_seqlens(LENGTHS, device=device)
    o, final = operator(*tokens, states, bounds)
    expected_o, expected_final = operator(*tokens.rows(slice(None), slice(used)), states, bounds)
    _assert_all_bitwise_equal((o[:, :used], final), (expected_o, expected_final))
    assert_bitwise_equal(o[:, used:], torch.zeros_like(o[:, used:]))


@operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_empty_sequence_returns_its_initial_state(operator, dtype, device):
    tokens, states = _inputs(1, 4, device), _states(4, device, dtype)
    bounds = cu_seqlens([0, 4, 0, 0], device=device)
    empty = torch.tensor([0, 2, 3], device=device)
    _, final = operator(*tokens, states, bounds)
    assert_bitwise_equal(final[empty], states[empty])
    _, from_zero = operator(*tokens, None, bounds)
    assert_bitwise_equal(from_zero[empty], torch.zeros_like(from_zero[empty]))


@operators
def test_nothing_but_empty_sequences_gives_zeros_and_the_initial_states(operator, device):
    tokens, states = _inputs(1, 4, device), _states(2, device)
    o, final = operator(*tokens, states, cu_seqlens([0, 0], device=device))
    assert_bitwise_equal(o, torch.zeros_like(o))
    assert_bitwise_equal(final, states)


@operators
def test_the_past_does_not_depend_on_the_future(operator, device):
    tokens = _inputs(2, 70, device)
    o, _ = operator(*tokens)
    for x in tokens:
        x[:, 41:] = x[:, 41:].flip(1)
    changed, _ = operator(*tokens)
    assert_bitwise_equal(changed[:, :41], o[:, :41])
    assert not torch.equal(changed[:, 41:], o[:, 41:])


@operators
def test_the_same_call_twice_gives_the_same_bits(operator, device):
    tokens, states = _inputs(2, 70, device), _states(2, device)
    _assert_all_bitwise_equal(operator(*tokens, states), operator(*tokens, states))


@operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [0, 1, 70], ids=lambda T: f"T{T}")
def test_inputs_are_not_modified_and_the_results_are_new(operator, T, dtype, device):
    if T == 0:  # one empty sequence and a token of none
        tokens, bounds = _inputs(1, 1, device), cu_seqlens([0], device=device)
    else:
        tokens, bounds = _inputs(1, T, device), None
    given = (*tokens, _states(1, device, dtype))
    before = [x.clone() for x in given]
    results = operator(*given, bounds, use_qk_l2norm=True)
    for x, y in zip(given, before, strict=True):
        assert_bitwise_equal(x, y)
    storages = {x.untyped_storage().data_ptr() for x in given}
    assert storages.isdisjoint(x.untyped_storage().data_ptr() for x in results)


@operators
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_results_have_the_dtypes_of_the_table_and_are_contiguous(
    operator, dtype, state_dtype, device
):
    tokens = _inputs(2, 3, device, dtype=dtype)
    transposed = tokens.map(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))
    state = None if state_dtype is None else _states(2, device, state_dtype)
    o, final = operator(*transposed, state)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    assert (o.dtype, final.dtype) == (dtype, state_dtype or arithmetic)
    assert o.is_contiguous()
    assert final.is_contiguous()


@operators
def test_what_is_left_out_has_its_neutral_value(operator, device):
    tokens = _inputs(2, 35, device)._replace(g=None, beta=None)
    zeros, ones = tokens.v.new_zeros(2, 35, HV), tokens.v.new_ones(2, 35, HV)
    state = torch.zeros_like(_states(2, device))
    spelled = operator(*tokens[:3], zeros, ones, state, scale=K**-0.5, use_qk_l2norm=False)
    limits = witnesses(oracle.delta_rule, *tokens)
    assert_all_equal_up_to_rounding(operator(*tokens), spelled, *limits, terms=K)


@operators
def test_int32_and_int64_bounds_are_the_same_bounds(operator, device):
    tokens = _inputs(1, sum(LENGTHS), device)
    _assert_all_bitwise_equal(
        operator(*tokens, None, cu_seqlens(LENGTHS, torch.int32, device)),
        operator(*tokens, None, cu_seqlens(LENGTHS, torch.int64, device)),
    )


@operators
def test_a_value_head_reads_the_key_head_of_its_group(operator, device):
    tokens = _inputs(2, 35, device)
    repeated = tokens._replace(
        q=tokens.q.repeat_interleave(HV // H, 2), k=tokens.k.repeat_interleave(HV // H, 2)
    )
    limits = witnesses(oracle.delta_rule, *tokens)
    assert_all_equal_up_to_rounding(operator(*tokens), operator(*repeated), *limits, terms=K)


@operators
def test_a_decay_per_channel_that_is_the_same_everywhere_is_a_decay_per_head(operator, device):
    tokens = _inputs(2, 35, device)
    per_channel = tokens._replace(g=tokens.g[..., None].expand(-1, -1, -1, K))
    limits = witnesses(oracle.delta_rule, *tokens)
    assert_all_equal_up_to_rounding(operator(*per_channel), operator(*tokens), *limits, terms=K)


@operators
@hypothesis.given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    slack=st.integers(0, 3),
    kda=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_packing_equals_the_oracle(operator, lengths, slack, kda, seed):
    tokens = make_inputs(1, max(1, sum(lengths) + slack), 1, 2, 8, 4, kda=kda, seed=seed)
    states = make_state(len(lengths), 2, 4, 8, seed=seed)
    assert_equals_oracle(operator, ((*tokens, states, cu_seqlens(lengths)), {}))
