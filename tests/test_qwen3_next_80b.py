"""Qwen3-Next-80B-A3B as published: what the example counts, on ``meta`` and for a GPU not here."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from gdn_ops.integrations.transformers import use_gdn_ops
from lowering.fake_gpu import generate

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}

without_a_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="for machines without a GPU: it makes one up"
)


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("qwen3_next_80b")
    sys.path.remove(str(EXAMPLES))


def test_the_published_model_has_80_billion_parameters_of_which_a_token_uses_3(example):
    model = example.published_model()
    held = example.memory(model)
    parameters = sum(p.numel() for p in model.parameters())
    assert round(parameters / 1e9) == 80
    assert held.weights == 2 * parameters
    # The name counts neither the embedding nor the head.
    head = 2 * model.lm_head.weight.numel()
    used = held.dense - head + held.experts * 10 // 512
    assert round(used / 2 / 1e9) == 3


def test_states_and_keys_have_the_bytes_of_the_published_sizes(example):
    held = example.memory(example.published_model())
    assert held.recurrent == 36 * 32 * 128 * 128 * 4
    # transformers keeps all four columns of a convolution of four taps.
    assert held.convolution == 36 * (16 * 128 * 2 + 32 * 128) * 4 * 2
    assert held.kv_token == 12 * 2 * 2 * 256 * 2


@pytest.mark.parametrize(("experts", "per_token", "batch"), [(4, 2, 3), (5, 1, 3), (3, 3, 2)])
def test_experts_touched_are_the_mean_over_all_ways_to_route(example, experts, per_token, batch):
    choices = list(itertools.combinations(range(experts), per_token))
    ways = list(itertools.product(choices, repeat=batch))
    mean = sum(len(set().union(*way)) for way in ways) / len(ways)
    assert example.distinct_experts(experts, per_token, batch) == pytest.approx(mean, rel=1e-12)


def test_a_step_moves_each_weight_once_and_each_state_twice(example):
    model = example.published_model(**SMALL)
    held = example.memory(model)
    every_expert = example.step(model.config, held, batch=2000, context=10)
    assert every_expert.weights == held.dense + held.experts + 2000 * held.embedding_row
    assert every_expert.states == 2 * 2000 * (held.recurrent + held.convolution)
    assert every_expert.keys_values == 2000 * 11 * held.kv_token
    assert every_expert.milliseconds == 1e3 * every_expert.moved / 4.8e12


@without_a_gpu
def test_each_state_is_handed_to_one_launch_of_a_step_and_copied_by_none(example):
    batch, model = 3, example.published_model(**SMALL)
    call, inputs = example.step_of("gdn", model, batch, context=32)
    with use_gdn_ops(model), torch.no_grad():
        (module,) = generate(call, inputs)
    _, cache = call.args
    state = cache.layers[0].recurrent_states[0]
    assert state.numel() * state.itemsize == batch * example.memory(model).recurrent
    given = [
        launch.kernel.kind
        for launch in module.launches
        for x in launch.args.values()
        if isinstance(x, torch.Tensor) and (x.numel(), x.dtype) == (state.numel(), state.dtype)
    ]
    assert given == ["template"]


@without_a_gpu
def test_the_main_job_lowers_a_model_to_one_graph_without_an_opaque_call(example, capsys):
    sizes = ["--batch", "3", "--context", "32", "--config", json.dumps(SMALL)]
    example.main(["--json", "--parts", "model", *sizes])
    record = json.loads(capsys.readouterr().out)
    (whole,) = record["parts"]
    assert whole["graphs"] == 1
    assert whole["templates"] == {"gdn.causal_conv1d_": 1, "gdn.recurrent_": 1}
    assert not whole["opaque"]
    assert not whole["not_compiled"]
    assert not whole["cudagraph_skips"]
    assert [one["batch"] for one in record["steps"]] == list(example.BATCHES)
    times = [one["milliseconds"] for one in record["steps"]]
    assert times == sorted(times)


def test_the_main_job_prints_the_bytes_and_times_as_tables(example, capsys):
    example.main(["--parts"])
    printed = capsys.readouterr().out
    assert "159,348.8" in printed
    assert "The weights, 159 GB, do not fit one H200" in printed
