"""What a Qwen3-Next layer becomes on sm_90: our templates, and what Inductor fuses itself.

The lists are every launch and every library call of a graph, in order. They are pinned for one
release of torch and of transformers; the laws around them hold for all.
"""

import copy
import functools
import importlib
from pathlib import Path

import expecttest
import pytest
import torch
from lowered_layers import (
    block,
    filled_cache,
    hidden,
    inventory,
    kernels_on,
    model_of,
    pinned,
    template_names,
    verify,
    verify_inputs,
)
from tiny_models import CLASSES, gdn_layers, new_cache
from tiny_models import model_of as model_of_family

from gdn_ops.integrations.transformers import use_gdn_ops
from gdn_ops.kernels import chunk_hopper
from lowering import epilogue
from lowering.fake_gpu import generate
from lowering.generated import library_calls

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
PHASES = ("decode", "verify", "prefill", "prefill_new_cache", "prefill_after_prefix", "training")
BF16 = torch.bfloat16


@functools.cache
def layer_in(phase, combo_kernels=False):
    """The graphs of a decoder layer in a phase, and the states that it updates in place."""
    model = model_of(BF16)
    layer, states = model.model.layers[0], ()
    step, options = functools.partial(block, layer), {"combo_kernels": combo_kernels}
    with use_gdn_ops(), torch.set_grad_enabled(phase == "training"):
        if phase == "decode":
            cache, mode = filled_cache(model, 3), "reduce-overhead"
            states = _states_of(cache)
            inputs = (hidden(3, 1, dynamic=True), cache)
        elif phase == "verify":
            step, mode = functools.partial(verify, layer.linear_attn), "reduce-overhead"
            pools = verify_inputs(layer.linear_attn, 3, 4)
            states, inputs = pools[:2], (hidden(3, 4), *pools)
            for x in (inputs[0], *pools[2:]):
                torch._dynamo.mark_dynamic(x, 0)
        else:
            mode, inputs = None, (hidden(2, 70, dynamic=True),)
        if phase == "prefill_new_cache":
            inputs = (*inputs, new_cache("static", model, 512))
        elif phase == "prefill_after_prefix":
            cache = filled_cache(model, 2)
            states, inputs = _states_of(cache), (*inputs, cache)
        return generate(step, inputs, mode=mode, options=options), states


def _states_of(cache):
    """The convolution's and the recurrence's state, of any batch."""
    layer = cache.layers[0]
    states = layer.conv_states[0], layer.recurrent_states[0]
    for state in states:
        torch._dynamo.mark_dynamic(state, 0)
    return states


@pytest.mark.parametrize("phase", PHASES)
def test_no_operator_stays_an_opaque_call(phase):
    """One graph, or two in training, and in them no call of an operator of this package."""
    modules = layer_in(phase)[0]
    phases = [module.phase for module in modules]
    assert phases in (["inference"], ["forward", "backward"])
    for module in modules:
        assert set(library_calls(module.code)) == {"extern_kernels.mm"}
        assert template_names(module)


@pytest.mark.parametrize("phase", PHASES)
def test_a_layer_is_our_templates_kernels_of_inductor_and_matrix_products(phase):
    """In each phase of its life; the lists below say which."""
    for module in layer_in(phase)[0]:
        kinds = {launch.kernel.kind.removeprefix("persistent_") for launch in module.launches}
        assert kinds == {"template", "pointwise", "reduction"}
        templates = [x.kernel for x in module.launches if x.kernel.kind == "template"]
        assert all(kernel.template is not None for kernel in templates)


@pytest.mark.parametrize("phase", ["decode", "verify"])
def test_the_recurrence_touches_a_state_once_and_nothing_copies_it(phase):
    (module,), (conv_state, state) = layer_in(phase)
    assert kernels_on(module, conv_state) == ["gdn_causal_conv1d"]
    assert kernels_on(module, state) == ["gdn_recurrent"]
    assert "copy_(" not in module.code


@pytest.mark.parametrize("phase", ["prefill_new_cache", "prefill_after_prefix"])
def test_prefill_into_a_cache_reads_its_recurrent_state_once_and_writes_it_once(phase):
    (module,), _ = layer_in(phase)
    _, state = _states_of(filled_cache(model_of(BF16), 2))
    assert kernels_on(module, state) == ["gdn_chunk_chain", "gdn_chunk_scan"]


LATE = "USE_DESCRIPTOR_STORE : tl.constexpr = True"


@pytest.mark.parametrize("phase", PHASES[2:])
def test_a_norm_leaves_nothing_to_fuse_into_the_output_of_prefill(phase):
    """A descriptor stores it: the norm must have read a whole head before it computes anything."""
    assert LATE in layer_in(phase)[0][0].code


@pytest.mark.parametrize("family", CLASSES)
@torch.no_grad()
def test_no_family_misses_a_fusion_into_the_output_of_prefill(family, monkeypatch):
    """With the store that Inductor could fuse into, a layer has as many launches."""
    layer = gdn_layers(copy.deepcopy(model_of_family(family)).to(BF16))[0]
    with use_gdn_ops():
        (module,) = generate(layer, (hidden(2, 70),))
        monkeypatch.setattr(epilogue, "may_be_fused", lambda node: node)
        (other,) = generate(layer, (hidden(2, 70),))
    assert LATE in module.code
    assert LATE not in other.code
    assert template_names(module) == template_names(other)
    assert len(module.launches) == len(other.launches)


@pytest.mark.parametrize("phase", ["decode", "verify"])
def test_cuda_graphs_have_no_reason_to_skip(phase):
    (module,) = layer_in(phase)[0]
    assert module.cudagraph_skips == []


@pytest.mark.parametrize("phase", PHASES)
def test_one_code_serves_every_batch_and_length(phase):
    """``mark_dynamic`` refuses a size that the code depends on; the sizes are inputs."""
    for module in layer_in(phase)[0]:
        sizes = {x for x in module.inputs if isinstance(x, int)}
        assert sizes >= ({3} if phase in ("decode", "verify") else {2, 70})


@pinned
def test_kernels_of_a_decode_step():
    (module,) = layer_in("decode")[0]
    expecttest.assert_expected_inline(
        inventory(module),
        """\
reduction: pow mean add rsqrt mul
extern_kernels.mm
extern_kernels.mm
pointwise: cat
template: gdn_causal_conv1d
template: gdn_recurrent
reduction: pow mean add rsqrt mul silu
extern_kernels.mm
reduction: add pow mean rsqrt mul
extern_kernels.mm
extern_kernels.mm
pointwise: silu mul
extern_kernels.mm
pointwise: add""",
    )


@pinned
def test_kernels_of_a_verify_step_without_norms_and_mlp():
    (module,) = layer_in("verify")[0]
    expecttest.assert_expected_inline(
        inventory(module),
        """\
extern_kernels.mm
extern_kernels.mm
pointwise: cat
template: gdn_causal_conv1d
template: gdn_recurrent
reduction: pow mean add rsqrt mul silu
extern_kernels.mm""",
    )


@pinned
def test_kernels_of_prefill():
    (module,) = layer_in("prefill")[0]
    expecttest.assert_expected_inline(
        inventory(module),
        """\
reduction: pow mean add rsqrt mul
extern_kernels.mm
extern_kernels.mm
pointwise: cat
template: gdn_causal_conv1d
template: gdn_chunk_prepare
template: gdn_chunk_carry
template: gdn_chunk_chain
template: gdn_chunk_scan
reduction: pow mean add rsqrt mul silu
extern_kernels.mm
reduction: add pow mean rsqrt mul
extern_kernels.mm
extern_kernels.mm
pointwise: silu mul
extern_kernels.mm
pointwise: add""",
    )


@pinned
def test_kernels_of_prefill_into_a_cache():
    """One launch more, which keeps the last inputs of the convolution."""
    (module,) = layer_in("prefill_new_cache")[0]
    expecttest.assert_expected_inline(
        inventory(module),
        """\
reduction: pow mean add rsqrt mul
extern_kernels.mm
extern_kernels.mm
pointwise: cat
pointwise: cat zeros
template: gdn_causal_conv1d
template: gdn_chunk_prepare
template: gdn_chunk_carry
template: gdn_chunk_chain
template: gdn_chunk_scan
reduction: pow mean add rsqrt mul silu
extern_kernels.mm
reduction: add pow mean rsqrt mul
extern_kernels.mm
extern_kernels.mm
pointwise: silu mul
extern_kernels.mm
pointwise: add""",
    )


@pinned
def test_kernels_of_several_tokens_after_a_cached_prefix():
    """Two launches more, which put the last inputs before the new ones; transformers does it so."""
    (module,) = layer_in("prefill_after_prefix")[0]
    expecttest.assert_expected_inline(
        inventory(module),
        """\
pointwise: cat
reduction: pow mean add rsqrt mul
extern_kernels.mm
extern_kernels.mm
pointwise: cat
pointwise: slice copy copy_
template: gdn_causal_conv1d
template: gdn_chunk_prepare
template: gdn_chunk_carry
template: gdn_chunk_chain
template: gdn_chunk_scan
reduction: pow mean add rsqrt mul silu
extern_kernels.mm
reduction: add pow mean rsqrt mul
extern_kernels.mm
extern_kernels.mm
pointwise: silu mul
extern_kernels.mm
pointwise: add""",
    )


@pinned
def test_kernels_of_a_training_step():
    forward, backward = layer_in("training")[0]
    expecttest.assert_expected_inline(
        inventory(forward),
        """\
reduction: pow mean add rsqrt mul
extern_kernels.mm
pointwise: sigmoid
pointwise: exp neg add softplus mul
extern_kernels.mm
pointwise: _unsafe_view view split_with_sizes clone
pointwise: cat
template: gdn_causal_conv1d
template: gdn_chunk_prepare
template: gdn_chunk_carry
template: gdn_chunk_chain
template: gdn_chunk_scan
reduction: pow mean add rsqrt mul silu
extern_kernels.mm
reduction: add pow mean rsqrt mul
extern_kernels.mm
extern_kernels.mm
pointwise: silu mul
extern_kernels.mm
pointwise: add""",
    )
    expecttest.assert_expected_inline(
        inventory(backward),
        """\
extern_kernels.mm
extern_kernels.mm
pointwise: silu mul sigmoid fill sub add
extern_kernels.mm
extern_kernels.mm
extern_kernels.mm
extern_kernels.mm
reduction: add mul sum pow div
extern_kernels.mm
reduction: silu mul sum pow div add
template: gdn_chunk_prepare
pointwise: gdn.chunk_backward
template: gdn_chunk_backward_replay
template: gdn_chunk_backward_reverse
template: gdn_chunk_backward_gradients
pointwise: exp neg mul add softplus_backward sigmoid_backward cat
extern_kernels.mm
pointwise: zeros
pointwise: cat
template: gdn_causal_conv1d_backward
pointwise: mul sigmoid fill sub add cat
extern_kernels.mm
reduction: add mul sum
reduction: add mul sum
extern_kernels.mm
reduction: mul silu sum
reduction: mul silu sum
reduction: exp neg mul add softplus sum softplus_backward
reduction: exp add softplus mul sum neg
reduction: exp neg mul add softplus_backward sum
reduction: cat zeros gdn.causal_conv1d_backward
extern_kernels.mm
extern_kernels.mm
reduction: add mul sum""",
    )


@pinned
def test_combo_kernels_find_nothing_left_to_merge_in_a_prefill():
    """An option of Inductor: both gates are inside the operator's own kernel."""
    (module,) = layer_in("prefill_new_cache", combo_kernels=True)[0]
    (plain,) = layer_in("prefill_new_cache")[0]
    assert template_names(module) == template_names(plain)
    assert len(module.launches) == len(plain.launches)


@pytest.mark.parametrize("phase", ["decode", "prefill", "train"])
def test_the_layer_to_inspect_has_the_kernels_of_these_lists(phase, monkeypatch):
    """At the sizes of Qwen3-Next-80B-A3B, on meta, by the example's own call.

    The layer of the lists has few heads, so that a long prompt would be split; and few channels, so
    that there are no kernels in Gluon, for which the operator is called.
    """
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    example = importlib.import_module("inspect_layer")
    # Its own call holds until the process ends, which is that of other tests too.
    monkeypatch.setattr(example, "use_gdn_ops", lambda: None)
    with use_gdn_ops():
        modules = generate(*getattr(example, phase)(), mode="reduce-overhead")
    lists = layer_in({"train": "training", "prefill": "prefill_new_cache"}.get(phase, phase))[0]
    assert [m.cudagraph_skips for m in modules] == [[]] * len(modules)
    is_call = phase != "decode" and chunk_hopper.has_gluon()
    for m, listed in zip(modules, lists, strict=True):
        calls = [name for name in library_calls(m.code) if "ops.gdn." in name]
        operator = "chunk_backward" if m.phase == "backward" else "chunk"
        assert calls == [f"torch.ops.gdn.{operator}.default"] * is_call
        left_out = "gdn_chunk_" if is_call else ("gdn_chunk_carry", "gdn_chunk_chain")
        assert template_names(m) == [
            x for x in template_names(listed) if not x.startswith(left_out)
        ]
