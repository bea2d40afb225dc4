"""Generated modules of ``chunk`` and its gradient, in the interpreter, against float64 autograd."""

import oracle
import pytest
import torch
from autograd_oracle import _oracle_gradients as oracle_gradients
from autograd_oracle import upstream_of
from generated import run
from inputs import Shape, cu_seqlens, make_inputs, make_state
from tolerance import assert_as_accurate_as_plain

import gdn_ops
from lowering.fake_gpu import generate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
SHAPE = Shape(B=2, T=67, H=2, HV=4, K=16, V=24)


def _leaves(lengths, dtype=torch.float32, **options):
    shape = SHAPE if lengths is None else SHAPE._replace(B=1, T=sum(lengths) + 5)
    N = shape.B if lengths is None else len(lengths)
    tensors = (*make_inputs(*shape, dtype, **options), make_state(N, shape.HV, shape.V, shape.K))
    return [x.requires_grad_() for x in tensors]


def _generated_gradients(tensors, bounds, dynamic=False, heads_first=False, **options):
    """The gradients that the generated backward returns, and its code."""

    def chunk(*args):
        o, final_state = gdn_ops.chunk(*args, **options)
        return (o.transpose(1, 2).contiguous() if heads_first else o), final_state

    if dynamic:
        for x in tensors[:5]:
            torch._dynamo.mark_dynamic(x, 1)
    forward, backward = generate(chunk, (*tensors, bounds))
    for module in (forward, backward):
        assert ".default(" not in module.code, "an opaque call"
    final_state, *saved = run(forward.code, forward.inputs)[1:]
    saved.sort(key=lambda x: isinstance(x, torch.Tensor))  # sizes come first
    do, dfinal_state = upstream_of((tensors[2], final_state))
    if heads_first:
        do = do.transpose(1, 2).contiguous()
    found = run(backward.code, [*saved, do, dfinal_state])
    by_input = {id(x): gradient for x, gradient in zip(forward.inputs, found, strict=True)}
    return [by_input[id(x)] for x in tensors], backward.code


def _assert_equal_autograd(gradients, tensors, bounds, arithmetic=torch.float32, **options):
    exact, plain = (
        oracle_gradients(oracle.delta_rule, tensors, bounds, dtype=dtype, **options)
        for dtype in (torch.float64, arithmetic)
    )
    terms = max(SHAPE.K, SHAPE.V * SHAPE.HV // SHAPE.H)
    for name, *found in zip(NAMES, gradients, exact, plain, strict=True):
        actual, true, rough = found
        assert_as_accurate_as_plain(actual, true, rough.float(), terms=terms, name=f"d{name}")


@pytest.mark.parametrize("use_qk_l2norm", [False, True], ids=["", "l2norm"])
@pytest.mark.parametrize("lengths", [None, (3, 0, 64, 1)], ids=["batch", "packed"])
def test_generated_gradients_equal_autograd_through_the_loop(lengths, use_qk_l2norm):
    tensors = _leaves(lengths, unit_keys=not use_qk_l2norm)
    bounds = None if lengths is None else cu_seqlens(lengths)
    gradients, code = _generated_gradients(tensors, bounds, use_qk_l2norm=use_qk_l2norm)
    assert "'USE_DESCRIPTORS': False" in code
    _assert_equal_autograd(gradients, tensors, bounds, use_qk_l2norm=use_qk_l2norm)


def test_an_upstream_gradient_of_another_layout_is_made_contiguous():
    tensors = _leaves(None)
    gradients, _ = _generated_gradients(tensors, None, heads_first=True)
    _assert_equal_autograd(gradients, tensors, None)


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
@pytest.mark.parametrize("lengths", [None, (4, 0, 64, 1)], ids=["batch", "packed"])
def test_generated_gradients_of_float16_are_read_by_descriptors(lengths, dynamic):
    """They are as accurate as the loop in float16."""
    half = torch.float16
    tensors = _leaves(lengths, half, beta_dtype=half)
    bounds = None if lengths is None else cu_seqlens(lengths)
    gradients, code = _generated_gradients(tensors, bounds, dynamic)
    assert "'USE_DESCRIPTORS': True" in code
    _assert_equal_autograd(gradients, tensors, bounds, half)
