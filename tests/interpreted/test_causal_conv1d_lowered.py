"""The convolution as Inductor's templates: one launch with what follows it, equal to eager."""

import pytest
import torch
from generated import run
from inputs import cu_seqlens, generator, indices, make_convolution

import gdn_ops
from lowering.fake_gpu import generate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

D, W = 20, 4


def convolve(x, weight, bias, z, state=None, bounds=None):
    y, final = gdn_ops.causal_conv1d(x, weight, bias, state, bounds, activation="silu")
    return y * torch.sigmoid(z), final


def update(x, weight, bias, z, pool, slots, accepted=None, bounds=None):
    y = gdn_ops.causal_conv1d_(x, weight, bias, pool, slots, accepted, bounds, activation="silu")
    return y * torch.sigmoid(z), pool


def _random(*shape):
    return torch.randn(*shape, generator=generator(1))


def _inputs(B, T, layout=torch.Tensor.contiguous):
    x, weight, bias = make_convolution(B, T, D, W)
    return layout(x), weight, bias, _random(B, T, D)


def _kinds(module):
    return [launch.kernel.kind for launch in module.launches]


def _assert_generated_equals_eager(function, args, dynamic=False):
    """One launch, which leaves in the caller's own pool what eager leaves there."""
    if dynamic:
        for x in (args[0], args[3]):
            torch._dynamo.mark_dynamic(x, 1)
    copies = [None if x is None else x.clone(memory_format=torch.preserve_format) for x in args]
    expected = function(*copies)
    (module,) = generate(function, args)
    assert _kinds(module) == ["template"]
    for x, y in zip(run(module.code, module.inputs), expected, strict=False):
        torch.testing.assert_close(x, y)
    for x, y in zip(args, copies, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
@pytest.mark.parametrize("T", [2, 37])
def test_a_convolution_is_one_kernel_with_what_follows(T, dynamic):
    args = (*_inputs(2, T), _random(2, D, W - 1))
    _assert_generated_equals_eager(convolve, args, dynamic)


def test_inputs_whose_tokens_are_contiguous_are_not_copied():
    x, weight, _, z = _inputs(2, 37, lambda x: x.mT.contiguous().mT)
    _assert_generated_equals_eager(convolve, (x, weight, None, z))


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
def test_packed_rows_are_one_kernel(dynamic):
    lengths = (3, 0, 20, 1)
    args = (*_inputs(1, 32), _random(4, D, W - 1), cu_seqlens(lengths))
    _assert_generated_equals_eager(convolve, args, dynamic)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
def test_a_pool_is_updated_where_it_is(verify, T):
    accepted = indices([2, 3, 1]) if verify else None
    args = (*_inputs(3, T), _random(5, D, W - 1 + 2), indices([4, 1, -1]), accepted)
    _assert_generated_equals_eager(update, args)


def test_a_pool_is_updated_by_prompts_of_any_length():
    args = (*_inputs(2, 37), _random(5, D, W - 1), indices([4, 1]))
    _assert_generated_equals_eager(update, args, dynamic=True)


@pytest.mark.parametrize("T", [14, 37])
@pytest.mark.parametrize("given", ["", "state", "packed", "dynamic"])
def test_a_generated_backward_computes_the_gradients_of_eager(given, T):
    """With 14 tokens their blocks of 13 are two: sizes must not be computed in floating point."""
    packed = given == "packed"
    x, weight, bias, z = _inputs(1 if packed else 2, T)
    bounds = cu_seqlens((3, 0, 8, 1)) if packed else None
    state = _random(4 if packed else 2, D, W - 1) if given else None
    if given == "dynamic":
        for tensor in (x, z):
            torch._dynamo.mark_dynamic(tensor, 1)
    leaves = [t for t in (x, weight, bias, z, state) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    args = (x, weight, bias, z, state, bounds)
    expected = convolve(*args)
    upstream = [_random(*result.shape) for result in expected]
    forward, backward = generate(convolve, args)
    assert _kinds(backward).count("template") == 1
    y, final, *saved = run(forward.code, forward.inputs)
    torch.testing.assert_close((y, final), tuple(result.detach() for result in expected))
    saved.sort(key=lambda value: isinstance(value, torch.Tensor))  # sizes come first
    gradients = [g for g in run(backward.code, [*saved, *upstream]) if g is not None]
    for exact in torch.autograd.grad(expected, leaves, upstream):
        same_shape = [g for g in gradients if g.shape == exact.shape]
        assert any(torch.allclose(g, exact, rtol=1e-4, atol=1e-5) for g in same_shape)
