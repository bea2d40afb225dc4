"""Gradients of the functional operators against autograd through the oracle's loops."""

import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from autograd_oracle import assert_equals_autograd, gradients_of, upstream_of
from inputs import cu_seqlens, make_inputs, make_state
from tolerance import assert_bitwise_equal

import gdn_ops

pytestmark = pytest.mark.usefixtures("form")

H, HV, K, V = 2, 4, 16, 24
NAMES = ("q", "k", "v", "g", "beta", "initial_state")

operators = pytest.mark.parametrize(
    "operator", [gdn_ops.chunk, gdn_ops.recurrent], ids=["chunk", "recurrent"]
)


def _assert_delta_rule(operator, tensors, *args, **options):
    q, v = tensors[0], tensors[2]
    # dq and dk of a key head sum over the channels of the value heads that it serves.
    terms = max(q.shape[-1], v.shape[-1] * v.shape[2] // q.shape[2])
    assert_equals_autograd(
        operator, oracle.delta_rule, NAMES, tensors, *args, terms=terms, **options
    )


def _inputs(B, T, device="cpu", **options):
    return make_inputs(B, T, H, HV, K, V, device=device, **options)


def _states(N, device="cpu", dtype=torch.float32):
    return make_state(N, HV, V, K, dtype, device=device)


@operators
@pytest.mark.parametrize("T", [1, 2, 32, 33, 70])
def test_gradients_equal_autograd_through_the_loop(operator, T, device):
    _assert_delta_rule(operator, (*_inputs(2, T, device), _states(2, device)))


@operators
@pytest.mark.parametrize(
    ("B", "T", "H", "HV", "K", "V"),
    [(1, 65, 1, 2, 128, 20), (1, 40, 2, 2, 7, 40), (1, 9, 1, 3, 1, 1), (1, 17, 1, 2, 40, 150)],
)
def test_gradients_of_any_sizes(operator, B, T, H, HV, K, V, device):
    tokens = make_inputs(B, T, H, HV, K, V, device=device)
    _assert_delta_rule(operator, (*tokens, make_state(B, HV, V, K, device=device)))


@operators
@pytest.mark.parametrize("missing", ["g", "beta", "initial_state", "all"])
def test_gradients_where_an_argument_is_missing(operator, missing, device):
    tensors = dict(zip(NAMES, (*_inputs(2, 35, device), _states(2, device)), strict=True))
    for name in ("g", "beta", "initial_state") if missing == "all" else (missing,):
        tensors[name] = None
    _assert_delta_rule(operator, tuple(tensors.values()))


@operators
@pytest.mark.parametrize(
    "options", [{"scale": 0.7}, {"use_qk_l2norm": True}, {"use_qk_l2norm": True, "scale": 2.0}]
)
def test_gradients_with_options(operator, options, device):
    tokens = _inputs(2, 35, device, unit_keys="use_qk_l2norm" not in options)
    _assert_delta_rule(operator, (*tokens, _states(2, device)), **options)


@operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_reduced_inputs_and_states_are_rounded_once(operator, dtype, device):
    tokens = _inputs(2, 35, device, dtype=dtype, beta_dtype=dtype)
    _assert_delta_rule(operator, (*tokens, _states(2, device, dtype)))


@operators
def test_gradients_of_float64_inputs_are_computed_in_float64(operator, device):
    tokens = _inputs(2, 35, device, dtype=torch.float64, strong_decay=False)
    _assert_delta_rule(operator, (*tokens, _states(2, device, torch.float64)))


@operators
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_gradients_of_packed_sequences(operator, index_dtype, device):
    """Empty sequences hand the gradient of their state on; tokens of no sequence have none."""
    lengths = (3, 0, 40, 1, 20)
    tensors = (*_inputs(1, sum(lengths) + 5, device), _states(len(lengths), device))
    bounds = cu_seqlens(lengths, index_dtype, device)
    _assert_delta_rule(operator, tensors, bounds)
    for gradient in gradients_of(operator, tensors, bounds)[:5]:
        assert not gradient[:, sum(lengths) :].any()


@operators
def test_one_result_alone_may_have_a_gradient(operator, device):
    """The other then counts as zero, though autograd hands over no tensor of zeros."""
    leaves = [x.requires_grad_() for x in (*_inputs(1, 35, device), _states(1, device))]
    results = operator(*leaves)
    upstream = upstream_of(results)
    for i in (0, 1):
        alone = torch.autograd.grad(results[i], leaves, upstream[i], retain_graph=True)
        zeros = [g if j == i else torch.zeros_like(g) for j, g in enumerate(upstream)]
        both = torch.autograd.grad(results, leaves, zeros, retain_graph=True)
        for name, x, y in zip(NAMES, alone, both, strict=True):
            assert_bitwise_equal(x, y, f"d{name}")


@operators
@pytest.mark.parametrize("g", [-100.0, -1e4])
def test_gradients_under_strong_decay_are_finite_and_right(operator, g, device):
    tokens = _inputs(1, 70, device)
    tokens.g[:, 1::2] = g
    _assert_delta_rule(operator, (*tokens, _states(1, device)))
    tokens = tokens._replace(g=torch.full_like(tokens.g, g))
    gradients = gradients_of(operator, (*tokens, _states(1, device)))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[-1].abs().max() < 1e-30  # of the initial state, which everything forgets


@operators
def test_gradients_match_finite_differences(operator):
    tokens = make_inputs(1, 5, 1, 2, 3, 2, torch.float64, strong_decay=False)
    leaves = [x.requires_grad_() for x in (*tokens, make_state(1, 2, 2, 3, torch.float64))]
    assert torch.autograd.gradcheck(
        lambda *x: operator(*x, use_qk_l2norm=True, scale=0.7), leaves, fast_mode=False
    )


@operators
def test_gradients_of_strided_inputs_and_strided_upstream(operator, device):
    tensors = (*_inputs(2, 35, device), _states(2, device))

    def strided(*leaves):
        results = operator(*(x.movedim(1, -1).contiguous().movedim(-1, 1) for x in leaves))
        return tuple(x.movedim(1, -1).contiguous().movedim(-1, 1) for x in results)

    _assert_delta_rule(strided, tensors)


@operators
def test_only_the_inputs_are_saved_for_the_backward(operator):
    """So memory is linear in T, without a state or a matrix of decays for each chunk."""
    leaves = [x.requires_grad_() for x in (*_inputs(1, 200), _states(1))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        operator(*leaves)
    given = {x.data_ptr() for x in leaves}
    assert {x.data_ptr() for x in saved} == given


@operators
def test_a_gradient_of_a_decay_per_channel_is_refused(operator):
    tokens = _inputs(1, 3, kda=True)
    name = operator.__name__
    message = (
        f"{name}: a gradient with g of shape [B, T, HV, K] (a decay per key channel) is not "
        "served; use g of shape [B, T, HV], or call it under torch.no_grad()"
    )
    with pytest.raises(NotImplementedError) as raised:
        operator(tokens.q.requires_grad_(), *tokens[1:])
    assert str(raised.value) == message
    with torch.no_grad():
        operator(*tokens)


@operators
@hypothesis.settings(max_examples=10)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 36), min_size=1, max_size=4),
    slack=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_gradients_of_any_packing(operator, lengths, slack, seed):
    tokens = make_inputs(1, max(1, sum(lengths) + slack), 1, 2, 8, 4, seed=seed)
    states = make_state(len(lengths), 2, 4, 8, seed=seed)
    _assert_delta_rule(operator, (*tokens, states), cu_seqlens(lengths))
