"""``chunk`` against the float64 loop, the recurrent form and Hugging Face's chunked function."""

import hf_witness
import oracle
import pytest
import torch
from delta_rule_cases import DTYPES, OPTIONS, SHAPES, assert_equals_oracle, shape_call
from inputs import cu_seqlens, make_inputs, make_state
from tolerance import (
    assert_all_as_accurate_as_plain,
    assert_all_equal_up_to_rounding,
    assert_bitwise_equal,
    operands_of,
    witnesses,
)

from gdn_ops import chunk, recurrent

pytestmark = pytest.mark.usefixtures("form")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunk_is_as_accurate_as_the_plain_loop(shape, dtype, device):
    assert_equals_oracle(chunk, shape_call(shape, dtype, device))


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_of_chunk_means_what_the_oracle_says(case, device):
    assert_equals_oracle(chunk, OPTIONS[case](device))


@pytest.mark.parametrize("use_qk_l2norm", [False, True], ids=["", "l2norm"])
@pytest.mark.parametrize("given_state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("T", [1, 63, 64, 130])
def test_chunk_equals_the_chunked_function_of_hugging_face(T, given_state, use_qk_l2norm, device):
    tokens = make_inputs(2, T, 2, 4, 16, 24, torch.float64, device=device)
    state = make_state(2, 4, 24, 16, torch.float64, device=device) if given_state else None
    actual = chunk(*tokens, state, use_qk_l2norm=use_qk_l2norm)
    expected = hf_witness.delta_rule(
        "torch_chunk_gated_delta_rule", *tokens, state, use_qk_l2norm_in_kernel=use_qk_l2norm
    )
    hf_witness.assert_same_function(actual, expected)


@pytest.mark.parametrize("kda", [False, True], ids=["", "kda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 64, 97])
def test_chunks_equal_recurrence(T, dtype, kda, device):
    tokens = make_inputs(2, T, 2, 4, 32, 16, dtype, kda=kda, device=device)
    state = make_state(2, 4, 16, 32, device=device)
    limits = witnesses(oracle.delta_rule, *tokens, state, operands=operands_of(chunk, dtype))
    actual, expected = chunk(*tokens, state), recurrent(*tokens, state)
    assert_all_equal_up_to_rounding(actual, expected, *limits, terms=32)


@pytest.mark.parametrize("split", [1, 37, 64, 99])
def test_two_segments_equal_one(split, device):
    """The state carries all there is to know, wherever the chunks begin."""
    tokens = make_inputs(2, 100, 1, 2, 16, 24, device=device)
    state = make_state(2, 2, 24, 16, device=device)
    limits = witnesses(oracle.delta_rule, *tokens, state)
    first_o, middle = chunk(*tokens.rows(slice(None), slice(split)), state)
    second_o, final = chunk(*tokens.rows(slice(None), slice(split, None)), middle)
    actual = torch.cat([first_o, second_o], 1), final
    whole = chunk(*tokens, state)
    assert_all_equal_up_to_rounding(actual, whole, *limits, terms=16)
    if split % 64 == 0:  # the same chunks
        for x, y in zip(actual, whole, strict=True):
            assert_bitwise_equal(x, y)


def test_many_sequences_of_one_length_equal_each_alone(device):
    """More states than are computed together: some blocks are full, the last is not."""
    B, T, HV, K, V = 11, 5, 2, 256, 256
    tokens = make_inputs(B, T, 1, HV, K, V, device=device)
    o, final = chunk(*tokens)
    exact, plain = witnesses(oracle.delta_rule, *tokens)
    assert_all_as_accurate_as_plain((o, final), exact, plain, terms=K)


@pytest.mark.parametrize("g", [-100.0, -1e4, -torch.inf])
def test_decay_at_every_token_leaves_only_that_token(g, device):
    """Nothing overflows where the sum of the log decays is far below what exp can represent."""
    tokens = make_inputs(1, 130, 1, 2, 16, 8, device=device)
    tokens = tokens._replace(g=torch.full_like(tokens.g, g), beta=None)
    o, final = chunk(*tokens, make_state(1, 2, 8, 16, device=device), scale=1.0)
    k, q = (x.double().expand(-1, -1, 2, -1) for x in (tokens.k, tokens.q))
    v = tokens.v.double()
    expected = v * (k * q).sum(-1, keepdim=True)
    eps = torch.finfo(torch.float32).eps
    weight = (k * q).abs().sum(-1, keepdim=True)  # of the products behind <k, q>
    assert ((o - expected).abs() <= 16 * eps * v.abs() * weight).all()
    assert_bitwise_equal(final[0], (v[:, -1, :, :, None] * k[:, -1, :, None])[0].float())


def test_packed_sequences_of_any_order_have_the_same_states(device):
    """The order of the sequences decides which of them are computed together, nothing else."""
    lengths = (33, 5, 5, 64, 5, 1)
    tokens = make_inputs(1, sum(lengths), 1, 2, 16, 24, device=device)
    pieces = list(torch.arange(sum(lengths)).split(lengths))
    order = [4, 0, 2, 5, 1, 3]
    rows = torch.cat([pieces[n] for n in order])
    moved = tokens.map(lambda x: x[:, rows.to(device)])
    o, final = chunk(*tokens, None, cu_seqlens(lengths, device=device))
    bounds = cu_seqlens([lengths[n] for n in order], device=device)
    moved_o, moved_final = chunk(*moved, None, bounds)
    limits = witnesses(oracle.delta_rule, *tokens, None, cu_seqlens(lengths))
    restored = torch.empty_like(moved_o)
    restored[:, rows.to(device)] = moved_o
    final_restored = torch.empty_like(moved_final)
    final_restored[torch.tensor(order, device=device)] = moved_final
    assert_all_equal_up_to_rounding((restored, final_restored), (o, final), *limits, terms=16)
