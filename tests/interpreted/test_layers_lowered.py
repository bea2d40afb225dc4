"""What is generated for a Qwen3-Next layer, run in the interpreter, computes what the layer means.

The witnesses are the model code of transformers with its own functions, in float64 and in float32.
"""

import copy
import functools

import pytest
import torch
from generated import run
from lowered_layers import block, hidden, verify, verify_inputs
from tiny_models import (
    HIDDEN,
    exact_arithmetic,
    hugging_face_functions,
    new_cache,
    tiny_model,
    wide,
)
from tolerance import assert_as_accurate_as_plain

from gdn_ops.integrations.transformers import use_gdn_ops
from lowering.fake_gpu import generate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

F32 = torch.float32
B, T = 1, 66  # two chunks


@pytest.fixture
def model():
    """Without experts: what is under test is the layer around the operators."""
    return tiny_model(K=16, V=16, layers=2, experts=0)


def _witnesses(model, *pieces):
    """The last piece's outputs, and the states after it: exactly, and in plain float32."""
    found = []
    for context, twin in ((exact_arithmetic, wide(model)), (hugging_face_functions, model)):
        cache = new_cache("static", twin)
        with context(), torch.no_grad():
            for x in pieces:
                out = block(twin.model.layers[0], x.to(twin.dtype), cache)
        found.append((out, *_states(cache)))
    return found


def _states(cache):
    """Of the convolution's, what is ever read: the last inputs but the oldest."""
    layer = cache.layers[0]
    return layer.conv_states[0][..., 1:], layer.recurrent_states[0]


def _assert_accurate(actual, exact, plain, names=("output", "conv_state", "state")):
    for x, true, rough, name in zip(actual, exact, plain, names, strict=True):
        assert_as_accurate_as_plain(x, true, rough, terms=HIDDEN, name=name)


@torch.no_grad()
def test_generated_prefill_computes_what_the_layer_means(model):
    x, cache, layer = hidden(B, T, F32), new_cache("static", model), model.model.layers[0]
    with use_gdn_ops():
        (module,) = generate(functools.partial(block, layer), (x, cache))
    results = run(module.code, module.inputs)
    exact, plain = _witnesses(model, x)
    shapes = x.shape, (B, layer.linear_attn.conv_dim, 4), exact[2].shape
    out, conv_state, state = (next(r for r in results if r.shape == shape) for shape in shapes)
    _assert_accurate((out, conv_state[..., 1:], state), exact, plain)
    assert state.mT.is_contiguous()


@torch.no_grad()
def test_a_generated_decode_step_updates_the_cache_where_it_lies(model):
    prompt, x, cache = hidden(B, 5, F32), hidden(B, 1, F32, seed=1), new_cache("static", model)
    layer = model.model.layers[0]
    with use_gdn_ops():
        block(layer, prompt, cache)
        (module,) = generate(functools.partial(block, layer), (x, cache), mode="reduce-overhead")
    (out,) = run(module.code, module.inputs)
    _assert_accurate((out, *_states(cache)), *_witnesses(model, prompt, x))


def test_generated_training_computes_the_gradients_of_the_layer(model):
    layer, x = copy.deepcopy(model.model.layers[0]), hidden(B, T, F32)
    x.requires_grad_()
    dy = hidden(B, T, F32, seed=1)
    with use_gdn_ops():
        forward, backward = generate(functools.partial(block, layer), (x,))
    out, *saved = run(forward.code, forward.inputs)
    found = run(backward.code, [*saved, dy])
    by_input = {id(source): d for source, d in zip(forward.inputs, found, strict=True)}

    def gradients(twin, dtype):
        source = x.detach().to(dtype).requires_grad_()
        result = block(twin, source)
        wanted = [source, *twin.parameters()]
        return [result.detach(), *torch.autograd.grad(result, wanted, dy.to(dtype))]

    with exact_arithmetic():
        exact = gradients(wide(model).model.layers[0], torch.float64)
    with hugging_face_functions():
        plain = gradients(layer, F32)
    names = ["output", "x", *(name for name, _ in layer.named_parameters())]
    ours = [out, *(by_input[id(source)] for source in (x, *layer.parameters()))]
    for d, true, rough, name in zip(ours, exact, plain, names, strict=True):
        assert_as_accurate_as_plain(d, true, rough, terms=B * T, name=name)


@torch.no_grad()
def test_generated_verify_steps_compute_what_the_accepted_text_means(model):
    """Of three steps' drafts the first step's are rejected and the others' accepted."""
    layer = model.model.layers[0].linear_attn
    N, S = 2, 3
    text = hidden(N, 1 + 2 * S, F32)
    drafts = hidden(N, S - 1, F32, seed=2)
    steps = [torch.cat([text[:, :1], drafts], 1), text[:, 1 : 1 + S], text[:, 1 + S :]]
    x, pools = torch.empty(N, S, HIDDEN), verify_inputs(layer, N, S, F32)
    conv_state, state, _, _, accepted = pools
    conv_state.zero_()
    state.zero_()
    (module,) = generate(functools.partial(verify, layer), (x, *pools), mode="reduce-overhead")
    outs = []
    for tokens, count in zip(steps, (1, 1, S), strict=True):
        x.copy_(tokens)
        accepted.fill_(count)
        outs.extend(run(module.code, module.inputs))

    found = []
    for context, twin in ((exact_arithmetic, wide(model)), (hugging_face_functions, model)):
        with context():
            found.append(twin.model.layers[0].linear_attn(text.to(twin.dtype)))
    accepted_outs = torch.cat([outs[0][:, :1], *outs[1:]], 1)
    assert_as_accurate_as_plain(accepted_outs, *found, terms=HIDDEN, name="output")
