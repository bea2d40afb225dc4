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
from tiny_models import MODELING, model_of, new_cache, states, tiny_model, tokens

from gdn_ops.integrations.transformers import (
    FAMILIES,
    REPLACEMENTS,
    causal_conv1d_update,
    recurrent_gated_delta_rule,
    use_gdn_ops,
)

modeling = MODELING["qwen3_next"]


def _in_place():
    """The functions that the model code calls now; those of all families are the same ones."""
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


def test_a_model_changes_its_own_family_and_no_model_changes_all():
    def changed():
        return {
            family
            for family, module in MODELING.items()
            if all(getattr(module, name) is f for name, f in REPLACEMENTS.items())
        }

    for family in MODELING:
        with use_gdn_ops(model_of(family, layers=2)):
            assert changed() == {family}
        assert not changed()
    with use_gdn_ops():
        assert changed() == set(MODELING)
    assert not changed()


def test_the_last_installation_says_the_dtype_of_states():
    def dtype():
        cache = new_cache("dynamic", model)
        model(tokens(1, 3), past_key_values=cache)
        return states(cache)[0].dtype

    model = tiny_model(layers=2)
    with torch.no_grad(), use_gdn_ops(model, state_dtype=torch.bfloat16):
        with use_gdn_ops(model, state_dtype=torch.float16) as inner:
            assert dtype() == torch.float16
            last = use_gdn_ops(model)
            assert dtype() == torch.float32
            inner.undo()
            assert dtype() == torch.float32
            last.undo()
        assert dtype() == torch.bfloat16


def test_states_of_another_dtype_are_refused():
    message = "use_gdn_ops: state_dtype must be float32, bfloat16 or float16, got torch.int8"
    with pytest.raises(ValueError, match=f"^{message}$"):
        use_gdn_ops(state_dtype=torch.int8)


class _OlderLayer(torch.nn.Module):
    """A layer as 5.14 and older have it: it holds the functions, and need not have all."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            setattr(self, name, None)


def _older(monkeypatch, *names):
    """One of those layers, in a module of model code that is as old."""
    kind = type("Qwen3NextGatedDeltaNet", (_OlderLayer,), {"__module__": modeling.__name__})
    monkeypatch.setattr(modeling, "is_fast_path_available", False, raising=False)
    return torch.nn.Sequential(kind(*names))


def test_layers_of_older_releases_hold_the_functions_until_the_end_of_a_block(monkeypatch):
    names = ("chunk_gated_delta_rule", "recurrent_gated_delta_rule")
    model = _older(monkeypatch, *names, "causal_conv1d_update")
    with use_gdn_ops(model):
        assert model[0].recurrent_gated_delta_rule is recurrent_gated_delta_rule
        assert model[0].causal_conv1d_update is causal_conv1d_update
        assert not hasattr(model[0], "causal_conv1d_fn")
        with use_gdn_ops(model):
            pass
        assert model[0].recurrent_gated_delta_rule is recurrent_gated_delta_rule
    assert all(getattr(model[0], name) is None for name in names)


def test_what_is_not_served_of_older_releases_is_refused(monkeypatch):
    model = _older(monkeypatch, "chunk_gated_delta_rule", "causal_conv1d_fn")
    message = "use_gdn_ops: model must be given with transformers 5.14 and older, got None"
    with pytest.raises(ValueError, match=f"^{message}$"):
        use_gdn_ops()
    with pytest.raises(NotImplementedError, match=r"has no recurrent_gated_delta_rule$"):
        use_gdn_ops(model)
    model[0].recurrent_gated_delta_rule = None
    ids = torch.zeros(1, 3, dtype=torch.int32)
    with use_gdn_ops(model):
        with pytest.raises(NotImplementedError, match=r"^causal_conv1d_fn: seq_idx must be None"):
            model[0].causal_conv1d_fn(x=torch.randn(1, 6, 3), weight=torch.ones(6, 4), seq_idx=ids)
        with pytest.raises(NotImplementedError, match=r"^chunk_gated_delta_rule: cu_seqlens must "):
            model[0].chunk_gated_delta_rule(cu_seqlens=torch.tensor([0, 3]))


def test_models_of_every_shape_are_accepted():
    causal = tiny_model()
    for model in (causal, causal.model, causal.model.layers[0], torch.nn.Sequential(causal)):
        with use_gdn_ops(model):
            assert _in_place() == REPLACEMENTS


def test_a_model_without_such_layers_is_refused():
    families = ", ".join(family for family in FAMILIES if family in MODELING)
    message = f"use_gdn_ops: model must have gated delta net layers of {families}, got "
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
from tiny_models import MODELING, greedy, hugging_face_functions, new_cache, tiny_model, tokens
from gdn_ops.integrations.transformers import use_gdn_ops

modeling = MODELING["qwen3_next"]
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
