"""What the step of a ``SpeculativeDecoder`` becomes on sm_90: one graph that CUDA graphs take."""

import functools

import pytest
import torch
from lowered_layers import kernels_on, model_of, template_names
from tiny_models import tokens

from gdn_ops.speculative import DraftModel, PromptLookup, SpeculativeDecoder
from gdn_ops.speculative.cache import RowStates
from lowering.fake_gpu import generate
from lowering.generated import library_calls

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

ROWS, DRAFTED = 3, 2


@functools.cache
def step_of(proposer):
    """The graphs of a step, and the states of its one recurrent layer."""
    model = model_of(torch.bfloat16)
    drafting = PromptLookup() if proposer == "prompt lookup" else DraftModel(model)
    with SpeculativeDecoder(model, ROWS, 64, DRAFTED, drafting, compile_options=None) as decoder:
        for row in range(ROWS):
            decoder.prefill(row, tokens(1, 5 + row)[0])
        with torch.no_grad():
            modules = generate(decoder._step, mode="reduce-overhead")
    (states,) = (x.slots for x in decoder._runner.cache.layers if hasattr(x, "slots"))
    return modules, states


@pytest.mark.parametrize("proposer", ["prompt lookup", "draft model"])
def test_a_step_is_one_graph_of_templates_that_cuda_graphs_take(proposer):
    """A draft reads what was kept, and then draws each further token in a call of its own."""
    (module,), _ = step_of(proposer)
    assert module.cudagraph_skips == []
    calls = 1 if proposer == "prompt lookup" else 1 + DRAFTED
    assert template_names(module) == ["gdn_causal_conv1d", "gdn_recurrent"] * calls
    assert not [name for name in library_calls(module.code) if "ops.gdn." in name]


def test_no_step_copies_a_pool_of_states():
    (module,), states = step_of("prompt lookup")
    assert isinstance(states, RowStates)
    assert kernels_on(module, states._state) == ["gdn_recurrent"]
