"""On a GPU a call that asks for no gradient goes past autograd, and no other call does."""

import pytest
import torch

import gdn_ops  # noqa: F401
from gdn_ops._library import past_autograd

# The parts of an operator that has a kernel and a gradient, in a namespace of its own.
_LIBRARY = torch.library.Library("gdn_test_launch", "DEF")


@pytest.fixture(scope="module")
def scaled():
    """``scaled(x, scale)``, and where its kernel was called: with which scale."""
    calls = []

    def kernel(x, other=None, *, scale=2.0):
        calls.append(scale)
        return x * scale

    def setup_context(ctx, inputs, keyword_only_inputs, output):
        ctx.scale = keyword_only_inputs["scale"]

    _LIBRARY.define("scaled(Tensor x, Tensor? other=None, *, float scale=2.0) -> Tensor")
    _LIBRARY.impl("scaled", kernel, "CPU")
    name = "gdn_test_launch::scaled"
    torch.library.register_fake(name, lambda x, other=None, **_: torch.empty_like(x), lib=_LIBRARY)
    torch.library.register_autograd(
        name,
        lambda ctx, dy: (dy * ctx.scale, None),
        setup_context=setup_context,
        lib=_LIBRARY,
    )
    shortcut = past_autograd(name, kernel, "CPU")
    _LIBRARY.impl("scaled", shortcut, "AutogradCPU", with_keyset=True)
    return torch.ops.gdn_test_launch.scaled, calls


def test_a_call_that_asks_for_no_gradient_goes_straight_to_its_kernel(scaled, monkeypatch):
    operator, calls = scaled
    x = torch.ones(3, requires_grad=True)
    monkeypatch.setattr(torch.autograd.Function, "apply", None)
    with torch.no_grad():
        assert not operator(x, scale=3.0).requires_grad
    assert not operator(x.detach(), None).requires_grad
    assert not operator(x.detach(), x.detach(), scale=5.0).requires_grad
    with torch.inference_mode():
        assert operator(torch.ones(3)).is_inference()
    assert calls[-4:] == [3.0, 2.0, 5.0, 2.0]


def test_a_gradient_is_that_of_the_registered_formula(scaled):
    operator, _ = scaled
    for options, scale in (({}, 2.0), ({"scale": 3.0}, 3.0)):
        x = torch.ones(3, requires_grad=True)
        operator(x, None, **options).sum().backward()
        assert torch.equal(x.grad, torch.full((3,), scale))


def test_no_call_goes_past_what_waits_below_autograd(scaled):
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    operator, calls = scaled
    seen = []

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watcher():
        operator(torch.ones(3))
    assert operator.default in seen
    before = len(calls)
    with FakeTensorMode() as mode:
        y = operator(mode.from_tensor(torch.ones(3)), scale=4.0)
    assert type(y).__name__ == "FakeTensor"
    assert len(calls) == before


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_compiled_call_and_its_gradient_equal_eager_ones(scaled, requires_grad):
    operator, _ = scaled
    x = torch.ones(3, requires_grad=requires_grad)
    y = torch.compile(lambda x: operator(x, scale=3.0) + 1, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(y, torch.full((3,), 4.0))
    if requires_grad:
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx, torch.full((3,), 3.0))


@pytest.mark.parametrize("name", ["chunk", "recurrent", "causal_conv1d"])
def test_operators_with_a_gradient_go_past_autograd_on_a_gpu(name):
    registered = torch._C._dispatch_dump(f"gdn::{name}").splitlines()
    assert any(line.startswith("AutogradCUDA:") for line in registered)
