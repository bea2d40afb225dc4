"""What Inductor generates for a GPU computes what eager PyTorch computes."""

import pytest
import torch
from generated import run
from torch.nn import functional as F

from lowering.fake_gpu import generate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def project(x, w):
    """Products, pointwise work and reductions, one of them along the other axis."""
    y = torch.softmax(x @ w, -1)
    return F.silu(y) * 2, y.sum(0), torch.erf(y) + torch.tanh(y), y.bfloat16()


def write_rows(x, pool, rows):
    pool[rows] = x
    return pool.cumsum(-1)


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _assert_close(actual, expected):
    assert len(actual) >= len(expected)
    for x, y in zip(actual, expected, strict=False):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_a_generated_module_computes_what_eager_computes(arch):
    x, w = _random(5, 64), _random(64, 32)
    (module,) = generate(project, (x, w), arch=arch)
    kinds = {launch.kernel.kind for launch in module.launches}
    assert {"persistent_reduction", "reduction"} & kinds
    _assert_close(run(module.code, module.inputs), project(x, w))


def test_a_generated_module_serves_other_sizes():
    x, w = _random(5, 64), _random(64, 32)
    torch._dynamo.mark_dynamic(x, 0)
    (module,) = generate(project, (x, w))
    longer = _random(9, 64)
    inputs = [9 if isinstance(t, int) else longer if t is x else t for t in module.inputs]
    _assert_close(run(module.code, inputs), project(longer, w))


def test_a_pool_is_written_in_place():
    x, pool, rows = _random(2, 8), torch.zeros(4, 8), torch.tensor([3, 1])
    expected_pool = pool.clone()
    (module,) = generate(write_rows, (x, pool, rows))
    expected = write_rows(x, expected_pool, rows)
    _assert_close(run(module.code, module.inputs), (expected,))
    assert torch.equal(pool, expected_pool)


def test_a_generated_backward_computes_the_gradients_of_eager():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.LayerNorm(16))
    x = _random(5, 8)
    forward, backward = generate(layer, (x,))
    y, *saved = run(forward.code, forward.inputs)
    expected = layer(x)
    torch.testing.assert_close(y, expected.detach())
    dy = _random(5, 16)
    gradients = [g for g in run(backward.code, [*saved, dy]) if g is not None]
    for exact in torch.autograd.grad(expected, list(layer.parameters()), dy):
        same_shape = [g for g in gradients if g.shape == exact.shape]
        assert any(torch.allclose(g, exact, atol=1e-5) for g in same_shape)
