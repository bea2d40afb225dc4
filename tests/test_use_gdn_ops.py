"""``use_gdn_ops`` takes effect when it should, refuses what it must and undoes itself."""

import itertools
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import transformers
from tiny_models import modeling, new_cache, tiny_model, tokens

from gdn_ops.integrations.transformers import FAMILIES, REPLACEMENTS, use_gdn_ops


def _in_place():
    """The functions that the model code calls now."""
    return {name: getattr(modeling, name) for name in REPLACEMENTS}


ORIGINALS = _in_place()


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    assert _in_place() == ORIGINALS


def test_a_call_holds_until_it_is_undone():
    installation = use_gdn_ops()
    assert _in_place() == REPLACEMENTS
    installation.undo()
    assert _in_place() == ORIGINALS


def test_a_block_holds_until_its_end():
    with use_gdn_ops():
        assert _in_place() == REPLACEMENTS
    assert _in_place() == ORIGINALS


def test_an_exception_ends_a_block_and_goes_on():
    error = RuntimeError("in the block")
    with pytest.raises(RuntimeError) as caught, use_gdn_ops():
        raise error
    assert caught.value is error
    assert _in_place() == ORIGINALS


def test_nested_blocks_end_with_the_outer_one():
    with use_gdn_ops():
        with use_gdn_ops():
            assert _in_place() == REPLACEMENTS
        assert _in_place() == REPLACEMENTS
    assert _in_place() == ORIGINALS


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_overlapping_installations_end_with_the_last_in_any_order(order):
    installations = [use_gdn_ops() for _ in order]
    for i in order:
        assert _in_place() == REPLACEMENTS
        installations[i].undo()
    assert _in_place() == ORIGINALS


def test_undoing_twice_is_undoing_once():
    first, second = use_gdn_ops(), use_gdn_ops()
    first.undo()
    first.undo()
    assert _in_place() == REPLACEMENTS
    second.undo()
    assert _in_place() == ORIGINALS


def test_a_block_may_be_undone_before_its_end():
    with use_gdn_ops() as installation:
        installation.undo()
        assert _in_place() == ORIGINALS


def test_it_can_be_used_again_after_it_was_undone():
    for _ in range(2):
        with use_gdn_ops():
            assert _in_place() == REPLACEMENTS


def test_models_of_every_shape_are_accepted():
    causal = tiny_model()
    for model in (causal, causal.model, causal.model.layers[0], torch.nn.Sequential(causal)):
        with use_gdn_ops(model):
            assert _in_place() == REPLACEMENTS


def test_a_model_without_such_layers_is_refused():
    families = [family for family in FAMILIES if find_spec(f"transformers.models.{family}")]
    message = f"use_gdn_ops: model must have gated delta net layers of {', '.join(families)}, got "
    full = transformers.Qwen3NextConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=0,
        intermediate_size=16,
    )
    with pytest.raises(ValueError, match=f"^{message}Qwen3NextForCausalLM$"):
        use_gdn_ops(transformers.Qwen3NextForCausalLM(full))
    with pytest.raises(ValueError, match=f"^{message}Linear$"):
        use_gdn_ops(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_model_code_that_is_laid_out_in_another_way_is_refused(name, monkeypatch):
    message = (
        f"use_gdn_ops: transformers must be a release from 4.57 to 5.24, "
        f"got {transformers.__version__}, whose qwen3_next has no {name}"
    )
    with monkeypatch.context() as patch:
        patch.delattr(modeling, name)
        with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
            use_gdn_ops()
        assert all(getattr(modeling, n) is f for n, f in ORIGINALS.items() if n != name)


def test_the_functions_take_all_that_the_model_code_passes():
    """Every operator of the four is reached, with and without a cache."""
    reached = set()

    def spied(name):
        def call(*args, **kwargs):
            reached.add(name)
            return REPLACEMENTS[name](*args, **kwargs)

        return call

    model, ids = tiny_model(), tokens(1, 3)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for name in REPLACEMENTS:
            patch.setattr(modeling, name, spied(name))
        cache = new_cache("dynamic", model)
        model(ids, past_key_values=cache)
        assert reached == {"torch_chunk_gated_delta_rule", "causal_conv1d_fn"}
        model(ids[:, :1], past_key_values=cache)
    assert reached == set(REPLACEMENTS)


WITH_FLA = """
import inspect, torch
from tiny_models import greedy, hugging_face_functions, modeling, new_cache, tiny_model, tokens
from gdn_ops.integrations.transformers import use_gdn_ops

unused = inspect.getclosurevars(modeling.torch_chunk_gated_delta_rule).nonlocals["implementation"]
assert unused.__module__.startswith("fla."), unused
model = tiny_model()
with torch.no_grad():
    with hugging_face_functions():
        expected = greedy(model, tokens(1, 70), new_cache("dynamic", model), 8)
    with use_gdn_ops(model):
        assert torch.equal(greedy(model, tokens(1, 70), new_cache("dynamic", model), 8), expected)
"""


@pytest.mark.skipif(find_spec("fla") is None, reason="fla-core is not installed")
def test_an_installed_fla_is_not_called():
    """In a process of its own: warnings are errors here, and fla warns where there is no GPU."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WITH_FLA]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
