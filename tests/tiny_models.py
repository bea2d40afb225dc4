"""Tiny random models of transformers, and what their own arithmetic makes of them."""

import contextlib
import copy
import functools
import importlib
from importlib.util import find_spec
from unittest import mock

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from gdn_ops.integrations.transformers import FAMILIES, REPLACEMENTS

VOCABULARY = 256
HIDDEN = 64
CACHES = ("dynamic", "static")

# What the installed release has, with the names of its classes.
CLASSES = {
    family: names
    for family, names in {
        "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
        "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
        "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
        "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM"),
        "qwen4_exp": ("Qwen4ExpTextConfig", "Qwen4ExpForCausalLM"),
        "lara_mini": ("LaraMiniConfig", "LaraMiniForCausalLM"),
    }.items()
    if find_spec(f"transformers.models.{family}")
}
MODELING = {
    family: importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for family in CLASSES
}
assert set(CLASSES) <= set(FAMILIES)


def _written_out(function):
    """The function below those that prefer an installed library; `kernels` hides it in a module."""
    return getattr(getattr(function, "forward", function), "__wrapped__", function)


# Up to 5.14 a layer holds the functions, and calls no others where there is no GPU.
_WRITTEN_OUT = {
    module: {name: _written_out(getattr(module, name)) for name in REPLACEMENTS}
    for module in MODELING.values()
    if not hasattr(module, "is_fast_path_available")
}

# One axis of a position turns both pairs of channels that have a rotary embedding.
_INTERLEAVED = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "mrope_section": [1, 1, 0],
    "mrope_interleaved": True,
}
_OF_FAMILY = {
    "qwen3_5": {"rope_parameters": _INTERLEAVED},
    "qwen3_5_moe": {"rope_parameters": _INTERLEAVED},
    "qwen4_exp": {
        "rope_parameters": _INTERLEAVED,
        # Its residual streams would drown what the layers say.
        "initializer_range": 0.2,
        "hc_count": 2,
        "hc_lowrank": 16,
        # Counted from 1: so a layer with a recurrence has the two further states of a convolution.
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "eos_token_id": VOCABULARY - 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_compress_ratio": 4,
        # More than the tests have tokens: rounding cannot send attention to other tokens.
        "indexer_budget": 1024,
    },
}


# K and V, equal and not, powers of two and not.
SHAPES = {
    "qwen3_next": (32, 16),
    "qwen3_5": (32, 32),
    "qwen3_5_moe": (16, 32),
    "olmo_hybrid": (24, 40),
    "qwen4_exp": (32, 32),
    "lara_mini": (16, 16),
}


@functools.cache
def tiny_model(
    K=32, V=16, layers=4, experts=4, experts_per_token=2, family="qwen3_next", attention=True
):
    """A model of random weights, the same at each call, of GDN layers and, last, one of attention.

    Two key heads serve four value heads, and every layer has a mixture of experts, or none if
    ``experts`` is 0 or the family has none. The time steps are those of a trained model, so that
    states remember tens to thousands of tokens.
    """
    torch.manual_seed(0)
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[family])
    config = config_class(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "num_hidden_layers": layers,
            "layer_types": ["linear_attention"] * (layers - attention)
            + ["full_attention"] * attention,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": K,
            "linear_value_head_dim": V,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": experts,
            "num_experts_per_tok": experts_per_token,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "initializer_range": 0.1,
            # A normed read that happens to be next to nothing would blow up its rounding error.
            "rms_norm_eps": 1e-2,
            "pad_token_id": 0,
            "eos_token_id": None,
            "attn_implementation": "sdpa",
            **_OF_FAMILY.get(family, {}),
        }
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for layer in gdn_layers(model):
            time_step = 10 ** (-3 + 2 * torch.rand(4))
            layer.dt_bias.copy_(time_step.expm1().log())
            layer.A_log.copy_(1 + 15 * torch.rand(4)).log_()
        for weight in model.parameters():
            # What starts at nothing would have no part in the result.
            if weight.dim() > 1 and not weight.any():
                weight.normal_(std=0.1)
    return model


def model_of(family, **options):
    """A tiny model of a family, in a shape of its own."""
    return tiny_model(*SHAPES[family], family=family, **options)


@functools.cache
def tiny_model_with_vision(family):
    """A tiny model that reads images too, and a call with one."""
    name = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        text_config=model_of(family).config.to_dict(),
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "patch_size": 4,
            "temporal_patch_size": 1,
            "num_position_embeddings": 64,
        },
        image_token_id=250,
        video_token_id=251,
        vision_start_token_id=252,
        vision_end_token_id=253,
    )
    ids = 1 + tokens(1, 70) % 249
    # An image of 4 x 4 patches is 4 tokens.
    ids[0, 9:15] = torch.tensor([252, 250, 250, 250, 250, 253])
    call = {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 250).int(),
    }
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval(), call


def gdn_layers(model):
    return [m for m in model.modules() if type(m).__name__.endswith("GatedDeltaNet")]


@functools.cache
def wide(model):
    """The same weights in float64."""
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation"):
        # The default is a grouped matrix product, which float64 has not.
        model.set_experts_implementation("eager")
    return model


def tokens(rows, length, seed=0):
    """Token ids without 0, which is what pads."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, length), generator=source)


def new_cache(kind, model, length=600):
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
    stack = contextlib.ExitStack()
    for module, functions in _WRITTEN_OUT.items():
        stack.enter_context(mock.patch.multiple(module, **functions))
    return stack


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
        found.append(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
    stacked = zip(parameters, zip(*found, strict=True), strict=True)
    # An indexer that picks tokens has no gradient.
    return {name: torch.stack(x) for name, x in stacked if x[0] is not None}
