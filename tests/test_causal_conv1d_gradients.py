"""Gradients of the causal convolution against autograd through the oracle's loop."""

import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from autograd_oracle import assert_equals_autograd, gradients_of, upstream_of
from inputs import cu_seqlens, generator, make_convolution
from tolerance import assert_bitwise_equal

from gdn_ops import causal_conv1d

NAMES = ("x", "weight", "bias", "initial_state")
activations = pytest.mark.parametrize("activation", [None, "silu"])


def _tensors(B, T, D=12, W=4, N=None, dtype=torch.float32, device="cpu", seed=0):
    history = torch.randn(N or B, D, W - 1, generator=generator(1)).to(device, dtype)
    return (*make_convolution(B, T, D, W, dtype, device=device, seed=seed), history)


def _assert_gradients(tensors, *args, **options):
    x, weight = tensors[:2]
    terms = max(weight.shape[1], x.shape[0] * x.shape[1])  # a tap meets every token
    assert_equals_autograd(
        causal_conv1d, oracle.convolution, NAMES, tensors, *args, terms=terms, **options
    )


@activations
@pytest.mark.parametrize("W", [2, 4, 5])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 37])
def test_gradients_equal_autograd_through_the_loop(T, W, activation, device):
    _assert_gradients(_tensors(2, T, W=W, device=device), activation=activation)


@activations
@pytest.mark.parametrize("missing", ["bias", "initial_state", "both"])
def test_gradients_where_an_argument_is_missing(missing, activation, device):
    tensors = dict(zip(NAMES, _tensors(2, 9, device=device), strict=True))
    for name in ("bias", "initial_state") if missing == "both" else (missing,):
        tensors[name] = None
    _assert_gradients(tuple(tensors.values()), activation=activation)


@activations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_have_the_dtypes_of_what_they_belong_to(dtype, activation, device):
    _assert_gradients(_tensors(2, 9, dtype=dtype, device=device), activation=activation)


def test_gradients_of_float32_parameters_of_bfloat16_inputs(device):
    x, weight, bias, state = _tensors(2, 9, device=device)
    _assert_gradients((x.bfloat16(), weight, bias, state.half()), activation="silu")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_gradients_of_packed_sequences(index_dtype, device):
    """Empty sequences hand the gradient of their state on; tokens of no sequence have none."""
    lengths = (3, 0, 20, 1, 2)
    tensors = _tensors(1, sum(lengths) + 5, N=len(lengths), device=device)
    bounds = cu_seqlens(lengths, index_dtype, device)
    _assert_gradients(tensors, bounds, activation="silu")
    dx = gradients_of(causal_conv1d, tensors, bounds, activation="silu")[0]
    assert not dx[:, sum(lengths) :].any()


def test_gradients_of_a_long_sequence_meet_without_a_seam(device):
    """More inputs than are convolved at a time, against autograd through calls of a piece each."""
    tensors = _tensors(1, 300, D=4096, dtype=torch.float64, device=device)

    def by_pieces(x, weight, bias, state):
        outputs = []
        for piece in x.split(50, 1):
            y, state = causal_conv1d(piece, weight, bias, state, activation="silu")
            outputs.append(y)
        return torch.cat(outputs, 1), state

    whole = gradients_of(causal_conv1d, tensors, activation="silu")
    for name, x, y in zip(NAMES, whole, gradients_of(by_pieces, tensors), strict=True):
        # Sums of 300 terms in another order; float64 has digits to spare.
        assert (x - y).abs().max() <= torch.finfo(torch.float32).eps * y.abs().max(), name


def test_one_result_alone_may_have_a_gradient(device):
    leaves = [x.requires_grad_() for x in _tensors(2, 9, device=device)]
    results = causal_conv1d(*leaves, activation="silu")
    upstream = upstream_of(results)
    for i in (0, 1):
        alone = torch.autograd.grad(
            results[i], leaves, upstream[i], retain_graph=True, materialize_grads=True
        )
        zeros = [g if j == i else torch.zeros_like(g) for j, g in enumerate(upstream)]
        both = torch.autograd.grad(results, leaves, zeros, retain_graph=True)
        for name, x, y in zip(NAMES, alone, both, strict=True):
            assert_bitwise_equal(x, y, f"d{name}")


@activations
def test_gradients_match_finite_differences(activation):
    leaves = [x.requires_grad_() for x in _tensors(2, 5, D=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: causal_conv1d(*x, activation=activation), leaves)


def test_silu_has_a_finite_gradient_far_from_zero(device):
    x, weight, bias, state = _tensors(2, 9, device=device)
    gradients = gradients_of(causal_conv1d, (1e4 * x, weight, bias, state), activation="silu")
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_only_the_inputs_are_saved_for_the_backward():
    leaves = [x.requires_grad_() for x in _tensors(2, 9)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        causal_conv1d(*leaves, activation="silu")
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in leaves}


@hypothesis.given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    slack=st.integers(0, 3),
    W=st.integers(2, 5),
    seed=st.integers(0, 2**16),
)
def test_gradients_of_any_packing(lengths, slack, W, seed):
    tensors = _tensors(1, max(1, sum(lengths) + slack), 6, W, N=len(lengths), seed=seed)
    _assert_gradients(tensors, cu_seqlens(lengths), activation="silu")
