"""A training step as a whole: with layers recomputed, compiled, and by transformers' Trainer."""

import copy
import importlib
from pathlib import Path

import pytest
import torch
import transformers
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from tiny_models import (
    exact_arithmetic,
    gradients,
    hugging_face_functions,
    model_of,
    tokens,
    wide,
)
from tolerance import assert_as_accurate_as_plain
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from gdn_ops.integrations.transformers import use_gdn_ops

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_.*able` is deprecated:FutureWarning"
)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _labelled(ids):
    return [{"input_ids": ids, "labels": ids}]


@pytest.fixture
def checkpointed():
    """A model that keeps only what enters each layer, and computes the rest again."""
    model = copy.deepcopy(model_of("qwen3_next", layers=2, experts=0))
    model.gradient_checkpointing_enable()
    return model.train()


def test_recomputed_layers_are_one_graph_and_its_backward_another_for_all_lengths(checkpointed):
    model, forward, backward = checkpointed, [], []

    def keep(graphs):
        def compiler(graph, inputs):
            graphs.append([str(node.target) for node in graph.graph.nodes])
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=keep(forward),
        bw_compiler=keep(backward),
        partition_fn=min_cut_rematerialization_partition,
    )
    compiled = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=True)
    batches = [_labelled(tokens(1, length)) for length in (70, 33, 130)]
    with use_gdn_ops(model):
        ours = gradients(model, *batches, forward=compiled)
    with exact_arithmetic():
        exact = gradients(wide(model), *batches)
    with hugging_face_functions():
        plain = gradients(model, *batches)
    for name, gradient in ours.items():
        assert_as_accurate_as_plain(gradient, exact[name], plain[name], terms=130, name=name)
    assert (len(forward), len(backward)) == (1, 1)
    # Computed again in the backward, not kept.
    assert forward[0].count("gdn.chunk.default") == backward[0].count("gdn.chunk.default") == 1


def _trained(model, folder):
    """Three steps of the Trainer; the losses, and the parameters after them."""
    ids = tokens(6, 70)
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = copy.deepcopy(model)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_the_trainer_takes_the_steps_that_it_takes_without_the_operators(
    family, recomputed, tmp_path
):
    model = copy.deepcopy(model_of(family, layers=2, experts=0)).double()
    if recomputed:
        model.gradient_checkpointing_enable()
    with exact_arithmetic():
        expected_losses, expected = _trained(model, tmp_path)
        with use_gdn_ops(model):
            losses, parameters = _trained(model, tmp_path)
    # In float64, and closer than float32 could tell apart.
    precision = torch.finfo(torch.float32).eps
    assert losses == pytest.approx(expected_losses, rel=precision)
    for name, p in parameters.items():
        error = (p - expected[name]).abs().max()
        assert error <= precision * expected[name].abs().max(), name


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    return importlib.import_module("train")


def test_the_example_compiles_its_whole_step_starts_with_the_eager_loss_and_learns(train):
    options = [
        "--steps",
        "6",
        "--batch",
        "2",
        "--length",
        "70",
        "--windows",
        "2",
        "--processes",
        "1",
    ]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "full_attention_interval": 2}
    first, last, counted = {}, {}, {}
    for extra in ([], ["--compile", "aot_eager"]):
        torch.manual_seed(0)
        model = train.new_model(train.small_config(**sizes))
        counters.clear()
        with use_gdn_ops(model):
            log = train.train(model, train.parse([*options, *extra]), rank=0)
        kind = len(extra) > 0
        first[kind], last[kind] = log.train[0][1], log.train[-1][1]
        counted[kind] = counters["stats"]["unique_graphs"]
    # Of forward and loss, and of the step of each optimizer.
    assert counted == {False: 0, True: 3}
    # A mean of 140 terms, in another order.
    assert first[True] == pytest.approx(first[False], rel=140**0.5 * torch.finfo(torch.float32).eps)
    assert last[True] < first[True]
