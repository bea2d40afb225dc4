"""``recurrent`` against the float64 loop and Hugging Face's function of that name."""

import hf_witness
import pytest
import torch
from delta_rule_cases import DTYPES, OPTIONS, SHAPES, assert_equals_oracle, shape_call
from inputs import make_inputs, make_state
from tolerance import assert_bitwise_equal

from gdn_ops import recurrent

pytestmark = pytest.mark.usefixtures("form")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_recurrent_is_as_accurate_as_the_plain_loop(shape, dtype, device):
    assert_equals_oracle(recurrent, shape_call(shape, dtype, device))


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_of_recurrent_means_what_the_oracle_says(case, device):
    assert_equals_oracle(recurrent, OPTIONS[case](device))


@pytest.mark.parametrize("use_qk_l2norm", [False, True], ids=["", "l2norm"])
@pytest.mark.parametrize("given_state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("T", [1, 33])
def test_recurrent_equals_the_function_of_hugging_face(T, given_state, use_qk_l2norm, device):
    tokens = make_inputs(2, T, 2, 4, 16, 24, torch.float64, device=device)
    state = make_state(2, 4, 24, 16, torch.float64, device=device) if given_state else None
    actual = recurrent(*tokens, state, use_qk_l2norm=use_qk_l2norm)
    expected = hf_witness.delta_rule(
        "torch_recurrent_gated_delta_rule", *tokens, state, use_qk_l2norm_in_kernel=use_qk_l2norm
    )
    hf_witness.assert_same_function(actual, expected)


@pytest.mark.parametrize("kda", [False, True], ids=["", "kda"])
@pytest.mark.parametrize("split", [1, 16, 19])
def test_two_segments_equal_one_bit_for_bit(split, kda, device):
    """A float32 state is handed on as it is, so the steps are the same steps."""
    tokens = make_inputs(2, 20, 2, 4, 16, 24, kda=kda, device=device)
    state = make_state(2, 4, 24, 16, device=device)
    first_o, middle = recurrent(*tokens.rows(slice(None), slice(split)), state)
    second_o, final = recurrent(*tokens.rows(slice(None), slice(split, None)), middle)
    whole_o, whole_final = recurrent(*tokens, state)
    assert_bitwise_equal(torch.cat([first_o, second_o], 1), whole_o, "o")
    assert_bitwise_equal(final, whole_final, "state")


def test_one_token_writes_what_the_formula_says(device):
    """By hand: S = [[2, 1]], half of it is left, k = e1, v = 5, beta = 0.5: S' = [[3, 0.5]]."""
    q, k = (torch.tensor(x, device=device).view(1, 1, 1, 2) for x in ([1.0, 2.0], [1.0, 0.0]))
    v = torch.full((1, 1, 1, 1), 5.0, device=device)
    g = torch.full((1, 1, 1), 0.5, device=device).log()
    beta = torch.full((1, 1, 1), 0.5, device=device)
    state = torch.tensor([2.0, 1.0], device=device).view(1, 1, 1, 2)
    o, final = recurrent(q, k, v, g, beta, state, scale=10.0)
    assert final.flatten().tolist() == [3.0, 0.5]
    assert o.item() == 40.0


def test_decay_of_infinity_forgets_everything(device):
    tokens = make_inputs(1, 3, 1, 2, 16, 8, device=device)
    tokens.g[:, 1] = -torch.inf
    state = make_state(1, 2, 8, 16, device=device)
    _, from_state = recurrent(*tokens, state)
    _, from_zero = recurrent(*tokens, torch.zeros_like(state))
    assert from_state.isfinite().all()
    assert_bitwise_equal(from_state, from_zero)
