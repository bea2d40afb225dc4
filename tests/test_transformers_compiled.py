"""A model of transformers with the operators under it compiles to one graph for every length.

Each test compiles with ``fullgraph=True``, so the first call makes one graph or fails, and then
forbids torch to compile again.
"""

import copy
import os
from unittest import mock

import pytest
import torch
from tiny_models import (
    CLASSES,
    HIDDEN,
    exact_arithmetic,
    gdn_layers,
    gradients,
    hugging_face_functions,
    model_of,
    new_cache,
    states,
    tiny_model,
    tokens,
    wide,
)
from tolerance import assert_as_accurate_as_plain

from gdn_ops.integrations.transformers import use_gdn_ops
from lowering import rules

LENGTHS = (70, 33, 130, 200, 5)  # one chunk and less, and several
STEPS = 3
# The indexer of Qwen4-Exp asks tensors for what they hold, which no graph can.
COMPILED = [family for family in CLASSES if family != "qwen4_exp"]
# Trained without experts, which qwen3_5_moe cannot be; qwen3_5 only with GDN_LONG=1, for time.
TRAINED = ["qwen3_next", "olmo_hybrid", *["qwen3_5"] * (os.environ.get("GDN_LONG") == "1")]


@pytest.fixture(autouse=True)
def operators_in_place():
    torch.compiler.reset()
    with use_gdn_ops():
        yield
    torch.compiler.reset()


def _compile(model, backend):
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=True)


def _assert_accurate(logits, model, ids, kind):
    with exact_arithmetic():
        exact = wide(model)(ids, use_cache=False).logits
    with hugging_face_functions():
        cache = new_cache(kind, model)
        pieces = ids.split([ids.shape[1] - STEPS] + [1] * STEPS, 1)
        plain = torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], 1)
    assert_as_accurate_as_plain(logits, exact, plain, terms=HIDDEN, name="logits")


def _prefill_and_decode(compiled, ids, cache):
    """The logits of ``ids``, the last STEPS tokens one by one; the states stay where they are."""
    prompt, *steps = ids.split([ids.shape[1] - STEPS] + [1] * STEPS, 1)
    logits = [compiled(prompt, past_key_values=cache).logits]
    places = [state.data_ptr() for state in states(cache)]
    for step in steps:
        # A tensor of its own: the strides of a slice tell of the length of the whole.
        logits.append(compiled(step.contiguous(), past_key_values=cache).logits)
    assert [state.data_ptr() for state in states(cache)] == places
    assert all(state.mT.is_contiguous() for state in states(cache))
    return torch.cat(logits, 1)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_next", "dynamic"), ("qwen3_5", "dynamic"), *((f, "static") for f in COMPILED)],
)
@torch.no_grad()
def test_prefill_is_one_graph_and_decode_another_for_all_lengths(family, kind):
    model = model_of(family, layers=3)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = _compile(model, backend)
    for length in LENGTHS:
        ids = tokens(1, length + STEPS)
        with torch.compiler.set_stance("fail_on_recompile" if graphs else "default"):
            logits = _prefill_and_decode(compiled, ids, new_cache(kind, model))
        assert len(graphs) == 2
        _assert_accurate(logits, model, ids, kind)
    operators = (["causal_conv1d", "chunk"], ["causal_conv1d_", "recurrent_"])
    for graph, names in zip(graphs, operators, strict=True):
        called = [str(node.target) for node in graph.graph.nodes]
        called = [name.split(".")[1] for name in called if name.startswith("gdn.")]
        assert called == names * len(gdn_layers(model))


@torch.no_grad()
def test_states_of_another_dtype_take_no_further_graph():
    model, graphs = tiny_model(layers=2), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = _compile(model, backend)
    for length in (70, 33):
        ids, cache = tokens(1, length + STEPS), new_cache("static", model)
        with use_gdn_ops(model, state_dtype=torch.bfloat16):
            _prefill_and_decode(compiled, ids, cache)
        assert all(state.dtype == torch.bfloat16 for state in states(cache))
        assert len(graphs) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # its import
@torch.no_grad()
def test_compiled_bfloat16_is_no_further_from_float64_than_eager():
    """In the log-probabilities after 2048 tokens, root mean square."""
    model = copy.deepcopy(tiny_model(layers=2, experts=0)).bfloat16()
    ids = tokens(1, 2048)
    with exact_arithmetic():
        exact = wide(model)(ids, use_cache=False).logits.log_softmax(-1)

    def error(call):
        logits = call(ids, use_cache=False).logits
        return (logits.double().log_softmax(-1) - exact).square().mean().sqrt()

    assert error(torch.compile(model, fullgraph=True)) <= error(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # its import
@torch.compiler.config.patch(cache_key_tag="without inlining")
@torch.no_grad()
def test_inductor_hands_the_states_of_a_cache_to_the_operators_without_a_copy(monkeypatch):
    # Inlined, as on a CPU, there is no call to look at; tests/test_lowering_cpu.py has that case.
    monkeypatch.delitem(rules.CPU_RULES, "recurrent_")
    model = tiny_model(layers=2)
    compiled = _compile(model, "inductor")
    ids = tokens(1, 70 + STEPS)
    logits = _prefill_and_decode(compiled, ids, new_cache("static", model))
    _assert_accurate(logits, model, ids, "static")

    update = torch.ops.gdn.recurrent_
    real, handed = update.default, []

    def spy(*args, **kwargs):
        handed.append(args[5].data_ptr())
        return real(*args, **kwargs)

    cache = new_cache("static", model)
    only_compiled = torch.compiler.set_stance("fail_on_recompile")
    # Generated code looks the operator up at each call.
    with only_compiled, mock.patch.object(update, "default", spy):
        again = _prefill_and_decode(compiled, ids, cache)
    assert torch.equal(again, logits)
    assert handed == [state.data_ptr() for state in states(cache)] * STEPS


@pytest.mark.parametrize("family", TRAINED)
def test_training_is_one_graph_and_its_backward_another_for_all_lengths(family):
    # Without experts: 5.20 has no backward for theirs that serves all lengths.
    model = model_of(family, layers=2, experts=0)
    compiled = _compile(model, "aot_eager")

    def forward(**call):
        loss = compiled(**call)
        torch.compiler.set_stance("fail_on_recompile")
        return loss

    batches = [
        [{"input_ids": ids, "labels": ids}]
        for ids in (tokens(1, 70), tokens(1, 33), tokens(1, 130))
    ]
    with torch.compiler.set_stance("default"):
        ours = gradients(model, *batches, forward=forward)
    with exact_arithmetic():
        exact = gradients(wide(model), *batches)
    with hugging_face_functions():
        plain = gradients(model, *batches)
    for name, gradient in ours.items():
        assert_as_accurate_as_plain(gradient, exact[name], plain[name], terms=130, name=name)
