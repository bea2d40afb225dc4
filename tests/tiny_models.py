"""Tiny random models of transformers, and what their own arithmetic makes of them."""

import contextlib
import copy
import functools
from unittest import mock

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_next import modeling_qwen3_next as modeling

from gdn_ops.integrations.transformers import REPLACEMENTS

VOCABULARY = 256
HIDDEN = 64
CACHES = ("dynamic", "static")
_WRITTEN_OUT = {name: getattr(modeling, name).__wrapped__ for name in REPLACEMENTS}


@functools.cache
def tiny_model(K=32, V=16, layers=4, experts=4, experts_per_token=2):
    """A Qwen3-Next of random weights, the same at each call, of GDN layers and one of attention.

    Two key heads serve four value heads, and every layer has a mixture of experts, or none if
    ``experts`` is 0. The time steps are those of a trained model, so that states remember tens to
    thousands of tokens.
    """
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        layer_types=["linear_attention"] * (layers - 1) + ["full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        intermediate_size=64,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        initializer_range=0.1,
        # A normed read that happens to be next to nothing would blow up its rounding error.
        rms_norm_eps=1e-2,
        attn_implementation="sdpa",
    )
    model = transformers.Qwen3NextForCausalLM(config).eval()
    with torch.no_grad():
        for layer in gdn_layers(model):
            time_step = 10 ** (-3 + 2 * torch.rand(4))
            layer.dt_bias.copy_(time_step.expm1().log())
            layer.A_log.copy_(1 + 15 * torch.rand(4)).log_()
    return model


def gdn_layers(model):
    return [m for m in model.modules() if isinstance(m, modeling.Qwen3NextGatedDeltaNet)]


@functools.cache
def wide(model):
    """The same weights in float64."""
    model = copy.deepcopy(model).double()
    # The default is a grouped matrix product, which float64 has not.
    model.set_experts_implementation("eager")
    return model


def tokens(rows, length, seed=0):
    """Token ids without 0, which is what pads."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, length), generator=source)


def new_cache(kind, model, length=512):
    """An empty cache of transformers; ``length`` is what a static one holds."""
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=length)
    return transformers.DynamicCache(config=model.config)


def states(cache):
    """The recurrent states of the GDN layers, ``[B, HV, K, V]``."""
    return [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "conv_states")]


def hugging_face_functions():
    """Until the end of the block, the model code calls the functions that are written out in it.

    Left alone it calls those of an installed fla, which need a GPU.
    """
    return mock.patch.multiple(modeling, **_WRITTEN_OUT)


@contextlib.contextmanager
def exact_arithmetic():
    """Until the end of the block, a ``wide`` model computes all in float64 with its own code."""
    with hugging_face_functions(), _FloatIsDouble():
        yield


class _FloatIsDouble(TorchDispatchMode):
    """What is asked for in float32 comes in float64, as in ``x.float()`` in the model code."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("dtype") == torch.float32:
            kwargs = kwargs | {"dtype": torch.float64}
        return function(*args, **kwargs)


def greedy(model, ids, cache, count):
    """The next ``count`` greedy tokens after ``ids``, ``[rows, count]``."""
    chosen = []
    for _ in range(count):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        chosen.append(ids)
    return torch.cat(chosen, 1)


def gradients(model, *batches, forward=None):
    """By name, the gradients for every batch, stacked; a batch is a list of calls.

    The loss of a batch is a sum over its tokens. ``forward`` is called in place of ``model``.
    """
    parameters = dict(model.named_parameters())
    options = {"num_items_in_batch": torch.tensor(1), "use_cache": False}
    found = []
    for calls in batches:
        loss = sum((forward or model)(**call, **options).loss for call in calls)
        found.append(torch.autograd.grad(loss, list(parameters.values())))
    return dict(zip(parameters, map(torch.stack, zip(*found, strict=True)), strict=True))
