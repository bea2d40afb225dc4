"""The two plain functions around the recurrence, against the model code that they replace."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from gdn_ops.gate import gdn_gate
from gdn_ops.rms_norm_gated import rms_norm_gated

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _gate_inputs(dtype):
    a = 8 * torch.randn(2, 7, 5)
    return a.to(dtype), torch.rand(5).mul(16).log().to(dtype), torch.randn(5).to(dtype)


def _norm_inputs(dtype, weight_dtype):
    x, z = torch.randn(2, 2, 7, 5, 24).unbind()
    return x.to(dtype), z.to(dtype), torch.randn(24).to(weight_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_equals_the_model_code_bit_for_bit(dtype):
    torch.manual_seed(0)
    a, A_log, dt_bias = _gate_inputs(dtype)
    expected = -A_log.float().exp() * F.softplus(a.float() + dt_bias)
    g = gdn_gate(a, A_log, dt_bias)
    assert g.dtype == torch.float32
    assert torch.equal(g, expected)


def test_gate_is_linear_above_twenty():
    a = torch.tensor([20.0, 20.0001, 60.0, 1e6]).reshape(4, 1)
    g = gdn_gate(a, torch.zeros(1), torch.zeros(1))
    assert torch.equal(g[1:], -a[1:])
    assert torch.allclose(g, -a)


def test_gate_never_lets_the_state_grow():
    a = torch.linspace(-200, 200, 41).reshape(41, 1)
    g = gdn_gate(a, torch.tensor([3.0]), torch.tensor([0.5]))
    assert (g <= 0).all()
    assert g.isfinite().all()


def test_gate_of_float64_inputs_is_computed_in_float64():
    torch.manual_seed(0)
    a, A_log, dt_bias = (x.double() for x in _gate_inputs(torch.float32))
    g = gdn_gate(a, A_log, dt_bias)
    expected = -A_log.exp() * torch.log1p((a + dt_bias).exp())
    torch.testing.assert_close(g, expected, rtol=1e-8, atol=1e-12)  # softplus(x) = x above 20
    assert g.dtype == torch.float64


def test_gate_gradients_match_finite_differences():
    torch.manual_seed(0)
    a, A_log, dt_bias = (x.double().requires_grad_() for x in _gate_inputs(torch.float32))
    assert torch.autograd.gradcheck(gdn_gate, (a, A_log, dt_bias))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda dtype: f"weight-{dtype}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_equals_the_model_code_bit_for_bit(dtype, weight_dtype):
    torch.manual_seed(0)
    x, z, weight = _norm_inputs(dtype, weight_dtype)
    module = Qwen3NextRMSNormGated(24, eps=1e-5)
    module.weight = torch.nn.Parameter(weight)
    y = rms_norm_gated(x, z, weight, 1e-5)
    assert y.dtype == dtype
    assert torch.equal(y, module(x, z))


def test_norm_has_the_default_eps_of_the_model_code():
    torch.manual_seed(0)
    x, z, weight = _norm_inputs(torch.float32, torch.float32)
    module = Qwen3NextRMSNormGated(24)
    module.weight = torch.nn.Parameter(weight)
    assert torch.equal(rms_norm_gated(1e-3 * x, z, weight), module(1e-3 * x, z))


def test_norm_of_a_zero_row_is_zero():
    z, weight = torch.randn(3, 24), torch.randn(24)
    assert torch.equal(rms_norm_gated(torch.zeros(3, 24), z, weight), torch.zeros(3, 24))


def test_norm_gradients_match_finite_differences():
    torch.manual_seed(0)
    x, z = (x[:, :2, :2, :5].double().requires_grad_() for x in torch.randn(2, 2, 7, 5, 24))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm_gated, (x, z, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_compiler_sees_through_both(dtype):
    """One graph, and nothing in it but ordinary aten operators."""
    torch.manual_seed(0)
    seen = []

    def backend(graph, _):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    def layer_end(x, z, weight, a, A_log, dt_bias):
        return rms_norm_gated(x, z, weight), gdn_gate(a, A_log, dt_bias)

    inputs = (*_norm_inputs(dtype, dtype), *_gate_inputs(dtype))
    torch._dynamo.reset()
    compiled = torch.compile(layer_end, backend=backend, fullgraph=True)
    for got, expected in zip(compiled(*inputs), layer_end(*inputs), strict=True):
        assert torch.equal(got, expected)
    assert len(seen) == 1
    assert not any("gdn" in str(target) for target in seen[0])


def test_gate_of_a_wrong_shape_is_refused():
    a = torch.randn(2, 7, 5)
    with pytest.raises(ValueError, match=r"^gdn_gate: A_log must have shape \[HV\] = \[5\], got "):
        gdn_gate(a, torch.zeros(4), torch.zeros(5))
    with pytest.raises(ValueError, match=r"^gdn_gate: dt_bias must have shape \[HV\] = \[5\], got"):
        gdn_gate(a, torch.zeros(5), torch.zeros(1))


def test_norm_of_a_wrong_shape_is_refused():
    x = torch.randn(2, 3, 4)
    message = r"z must have shape that of x = \[2, 3, 4\], got \[3, 4\]"
    with pytest.raises(ValueError, match=message):
        rms_norm_gated(x, x[0], torch.ones(4))
    with pytest.raises(ValueError, match=r"weight must have shape \[V\] = \[4\], got \[3\]"):
        rms_norm_gated(x, x, torch.ones(3))
