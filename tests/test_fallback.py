"""What fails in a lowering leaves an opaque call, one line in the log, and nothing half done."""

import logging
import sys
from unittest import mock

import pytest
import torch
from inputs import indices, make_convolution, make_inputs, make_state

import gdn_ops
import lowering
from gdn_ops import _library
from lowering import _inductor, rules
from lowering.fake_gpu import generate
from lowering.generated import library_calls
from lowering.template import KernelTemplate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

B, H, HV, K, V, D, W = 2, 2, 4, 32, 32, 64, 4


def _tokens(T):
    return make_inputs(B, T, H, HV, K, V, torch.bfloat16)


def _pool():
    return make_state(9, HV, V, K)


def _gradient(operator, tensors):
    def loss(*args):
        return operator(*args)[0].float().square().sum()

    return loss, [x.requires_grad_() for x in tensors]


CALLS = {
    "recurrent_": lambda: (gdn_ops.recurrent_, (*_tokens(1), _pool(), indices([3, 1]))),
    "recurrent": lambda: (gdn_ops.recurrent, _tokens(3)),
    "chunk_": lambda: (gdn_ops.chunk_, (*_tokens(70), _pool(), indices([3, 1]))),
    "causal_conv1d_": lambda: (
        gdn_ops.causal_conv1d_,
        (*make_convolution(B, 1, D, W), torch.zeros(B, D, W - 1)),
    ),
    "chunk_backward": lambda: _gradient(gdn_ops.chunk, _tokens(70)),
    "causal_conv1d_backward": lambda: _gradient(
        gdn_ops.causal_conv1d, make_convolution(B, 9, D, W)
    ),
}
# What lowerings do in turn: one fails where it does so for the last time.
STEPS = {
    "inputs": (_inductor, "realize"),
    "layout": (_inductor, "contiguous_layout"),
    "text": (KernelTemplate, "_template"),
    "selection": (_inductor, "select"),
}


def _generated(operator, step, fail_at=None):
    """The last module of a call, and how often its lowerings took the step."""
    owner, name = STEPS[step]
    take, taken = getattr(owner, name), 0

    def counted(*args, **keywords):
        nonlocal taken
        taken += 1
        if taken == fail_at:
            raise RuntimeError("injected\nwith a second line")
        return take(*args, **keywords)

    with mock.patch.object(owner, name, counted):
        modules = generate(*CALLS[operator]())
    return modules[-1], taken


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("operator", CALLS)
def test_a_step_that_fails_leaves_the_operator_opaque_and_nothing_half_done(operator, step, caplog):
    module, taken = _generated(operator, step)
    assert not [call for call in library_calls(module.code) if "gdn" in call]
    rules._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="lowering"):
        module, _ = _generated(operator, step, fail_at=taken)
    assert library_calls(module.code) == {f"torch.ops.gdn.{operator}.default": 1}
    assert not [launch for launch in module.launches if launch.kernel.kind == "template"]
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert said == f"gdn::{operator} stays an opaque call: RuntimeError: injected"


def test_a_compile_without_the_package_of_lowerings_is_one_of_opaque_calls(caplog):
    """As where another distribution's package of the name ``lowering`` is found."""
    lowering.unregister()
    _library._register_lowerings.cache_clear()
    try:
        with (
            mock.patch.dict(sys.modules, {"lowering.rules": None}),
            caplog.at_level(logging.INFO, logger="gdn_ops"),
        ):
            (module,) = generate(*CALLS["recurrent_"]())
    finally:
        lowering.register()
    assert library_calls(module.code) == {"torch.ops.gdn.recurrent_.default": 1}
    assert "no lowerings, operators stay opaque: ModuleNotFoundError" in caplog.text
