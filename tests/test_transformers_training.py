"""Gradients through a model of transformers are those of its own code.

The exact and the plain result are as in test_transformers.py. A gradient of a weight is a sum over
the tokens, so their number is the number of terms.
"""

import os

import pytest
import torch
from tiny_models import (
    CLASSES,
    exact_arithmetic,
    gradients,
    greedy,
    hugging_face_functions,
    model_of,
    new_cache,
    tokens,
    wide,
)
from tolerance import assert_as_accurate_as_plain
from transformers import DataCollatorWithFlattening

from gdn_ops.integrations.transformers import use_gdn_ops

BATCHES = 4
# With GDN_LONG=1 all, which takes some minutes.
WITH_SHORT_ROWS = CLASSES if os.environ.get("GDN_LONG") == "1" else ("qwen3_next",)


@pytest.fixture(scope="module", params=CLASSES)
def model(request):
    return model_of(request.param)


def _compare(model, ours, *batches):
    """The gradients ``ours`` are as accurate as those of the model code for the batches.

    There are several, because what rounding does to a gradient is one number drawn at random for
    all of its elements: that of one batch says little of how large it can be.
    """
    with exact_arithmetic():
        exact = gradients(wide(model), *batches)
    with hugging_face_functions():
        plain = gradients(model, *batches)
    terms = max(sum(call["input_ids"].numel() for call in calls) for calls in batches)
    assert ours.keys() == exact.keys()
    for name, gradient in ours.items():
        assert exact[name].any(), f"{name} has no part in the loss: a weak witness"
        assert_as_accurate_as_plain(gradient, exact[name], plain[name], terms=terms, name=name)


def _labelled(ids, **options):
    return {"input_ids": ids, "labels": ids, **options}


@pytest.mark.parametrize(
    ("family", "rows", "length"),
    [(family, 2, 130) for family in CLASSES] + [(family, 70, 3) for family in WITH_SHORT_ROWS],
)
def test_gradients_of_all_parameters_are_as_accurate_as_hugging_face_s(family, rows, length):
    model = model_of(family)
    batches = [[_labelled(tokens(rows, length, seed))] for seed in range(BATCHES)]
    with use_gdn_ops(model):
        ours = gradients(model, *batches)
    _compare(model, ours, *batches)


def _rows(lengths):
    """Batches of rows of these lengths."""
    return [[tokens(1, length, length + seed) for length in lengths] for seed in range(BATCHES)]


@pytest.mark.parametrize("family", [family for family in CLASSES if family != "qwen4_exp"])
def test_gradients_of_packed_sequences_are_those_of_the_sequences_alone(family):
    model = model_of(family)
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    batches = _rows([40, 2, 3, 65])
    packed = [collate([{"input_ids": x[0]} for x in rows], return_tensors="pt") for rows in batches]
    with use_gdn_ops(model):
        ours = gradients(model, *([batch] for batch in packed))
    _compare(model, ours, *(list(map(_labelled, rows)) for rows in batches))


def _padded(rows, width):
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = (ids != 0).long()
    # The first token of a row has no left neighbour that could predict it.
    labels = ids.masked_fill(mask.cumsum(1) < 2, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_gradients_of_padded_rows_are_those_of_the_rows_alone(model):
    batches = _rows([40, 2, 65])
    with use_gdn_ops(model):
        ours = gradients(model, *([_padded(rows, 65)] for rows in batches))
    _compare(model, ours, *(list(map(_labelled, rows)) for rows in batches))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated:FutureWarning")
def test_gradients_are_the_same_with_layers_recomputed(model):
    batch = [_labelled(tokens(2, 70))]
    with use_gdn_ops(model):
        expected = gradients(model, batch)
        model.gradient_checkpointing_enable()
        model.train()
        try:
            recomputed = gradients(model, batch)
        finally:
            model.eval()
            model.gradient_checkpointing_disable()
    for name, gradient in recomputed.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_works_where_gradients_are_recorded(model, kind):
    ids = tokens(2, 40)
    with use_gdn_ops(model):
        with torch.no_grad():
            expected = greedy(model, ids, new_cache(kind, model), 5)
        assert torch.equal(greedy(model, ids, new_cache(kind, model), 5), expected)
