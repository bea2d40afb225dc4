"""A Gated Delta Net layer of Qwen3-Next-80B-A3B, as transformers has it, to look at without a GPU.

    python -m lowering.inspect examples/inspect_layer.py:decode --mode reduce-overhead
    python -m lowering.inspect examples/inspect_layer.py:prefill
    python -m lowering.inspect examples/inspect_layer.py:train

Tensors are on ``meta`` and take no memory.
"""

from typing import Any

import torch
from torch import nn
from transformers import Qwen3NextConfig, StaticCache
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from gdn_ops.integrations.transformers import use_gdn_ops

# The sizes of a Qwen3NextConfig are those of this model, unless others are asked for.
CONFIG = Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"])

Call = tuple[nn.Module, tuple[Any, ...]]


def decode(batch: int = 64) -> Call:
    """One token of each request, after a prompt that is in a cache."""
    layer, prompt = layer_and_input(batch, 8)
    layer.requires_grad_(False)
    cache = StaticCache(config=CONFIG, max_cache_len=128)
    layer(prompt, cache)
    return layer, (prompt[:, :1].contiguous(), cache)


def prefill(batch: int = 1, tokens: int = 4096) -> Call:
    """A prompt, into a new cache."""
    layer, prompt = layer_and_input(batch, tokens)
    return layer.requires_grad_(False), (prompt, StaticCache(config=CONFIG, max_cache_len=tokens))


def train(batch: int = 2, tokens: int = 2048) -> Call:
    """Forward and backward."""
    layer, text = layer_and_input(batch, tokens)
    return layer, (text,)


def layer_and_input(batch: int, tokens: int) -> tuple[nn.Module, torch.Tensor]:
    use_gdn_ops()  # until the process ends
    with torch.device("meta"):
        layer = Qwen3NextGatedDeltaNet(CONFIG, layer_idx=0).bfloat16()
        return layer, torch.empty(batch, tokens, CONFIG.hidden_size, dtype=torch.bfloat16)
