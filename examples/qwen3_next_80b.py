"""Qwen3-Next-80B-A3B on an H200 that is not there: its kernels, its bytes, and its least times.

    python examples/qwen3_next_80b.py           tables; some minutes, no GPU, no weights
    python examples/qwen3_next_80b.py --json    the same for programs

The published sizes, on ``meta``: tensors take no memory. A layer with gated delta net, a layer with
attention and the whole model are traced and lowered as ``torch.compile`` does on a GPU, for one
decode step, and every kernel is compiled for the GPU. Bytes are those of the model's own parameters
and cache. The times are bytes over bandwidth, which nothing can beat; nothing here was timed.
"""

import argparse
import collections
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM, StaticCache

from gdn_ops.integrations.transformers import use_gdn_ops
from lowering.inspect import inspect

# https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct/blob/main/config.json
PUBLISHED: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "intermediate_size": 5120,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
}

# https://www.nvidia.com/en-us/data-center/h200/
H200_BANDWIDTH = 4.8e12  # bytes a second
H200_MEMORY = 141e9  # bytes

BATCHES = (1, 4, 16, 64, 256, 1024)
KINDS = {"gdn": "linear_attention", "attention": "full_attention"}

# A function and its positional arguments, on ``meta``.
Call = tuple[Callable[..., Any], tuple[Any, ...]]


def published_model(**changes: Any) -> Qwen3NextForCausalLM:
    """The model in bfloat16 on ``meta``, with other sizes where ``changes`` says so."""
    with torch.device("meta"):
        config = Qwen3NextConfig(**(PUBLISHED | changes), attn_implementation="sdpa")
        return Qwen3NextForCausalLM(config).bfloat16().eval().requires_grad_(False)


def filled_cache(model: Qwen3NextForCausalLM, batch: int, context: int) -> StaticCache:
    """A cache for ``context`` tokens, after a prompt; on ``meta`` as the model is."""
    cache = StaticCache(config=model.config, max_cache_len=context)
    with use_gdn_ops(model), torch.no_grad():
        model(torch.empty(batch, 8, dtype=torch.long, device="meta"), past_key_values=cache)
    return cache


def decode(model: Qwen3NextForCausalLM, cache: StaticCache, tokens: Tensor) -> Tensor:
    """One step of the whole model: the next tokens, ``[B, 1]``."""
    return model(tokens, past_key_values=cache).logits.argmax(-1)


def decode_layer(
    layer: nn.Module, cache: StaticCache, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
) -> Tensor:
    """One step of a decoder layer, experts included: ``x [B, 1, hidden_size]``."""
    return layer(x, (cos, sin), attention_mask=mask, past_key_values=cache)


def step_of(part: str, model: Qwen3NextForCausalLM, batch: int, context: int) -> Call:
    """A decode step of the first layer of a kind, with what its model hands it, or of ``model``."""
    cache, config = filled_cache(model, batch, context), model.config
    if part == "model":
        tokens = torch.empty(batch, 1, dtype=torch.long, device="meta")
        return functools.partial(decode, model, cache), (tokens,)
    kind = KINDS[part]
    layer = model.model.layers[config.layer_types.index(kind)]
    rotary = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
    empty = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
    x, angles = empty(batch, 1, config.hidden_size), (empty(1, 1, rotary), empty(1, 1, rotary))
    mask = empty(batch, 1, 1, context, dtype=torch.bool) if part == "attention" else None
    return functools.partial(decode_layer, layer, cache), (x, *angles, mask)


@dataclasses.dataclass(frozen=True)
class Inventory:
    """What one decode step consists of."""

    part: str
    seconds: float  # that tracing, lowering and compiling its kernels took here
    graphs: int
    templates: dict[str, int]  # launches of this package's kernels, by operator
    other_kernels: dict[str, int]  # launches of Inductor's own, by kind
    calls: dict[str, int]  # of libraries
    kernels: int  # different Triton kernels
    spills: int
    not_compiled: list[str]
    opaque: list[str]  # operators of this package without a kernel
    cudagraph_skips: list[str]

    @property
    def length(self) -> int:
        """Launches and calls."""
        counts = (self.templates, self.other_kernels, self.calls)
        return sum(sum(count.values()) for count in counts)


def inventory(part: str, call: Call) -> Inventory:
    start = time.monotonic()
    with use_gdn_ops(), torch.no_grad():
        graphs = inspect(lambda: call, mode="reduce-overhead")
    kernels = [kernel for graph in graphs for kernel in graph.kernels]
    templates: collections.Counter[str] = collections.Counter()
    others: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        if kernel.kind == "template":
            (operator,) = (name for name in kernel.fused if name.startswith("gdn."))
            templates[operator] += kernel.launches
        else:
            others[kernel.kind.removeprefix("persistent_")] += kernel.launches
    calls = sum((collections.Counter(graph.calls) for graph in graphs), collections.Counter())
    return Inventory(
        part=part,
        seconds=round(time.monotonic() - start, 1),
        graphs=len(graphs),
        templates=dict(templates),
        other_kernels=dict(others),
        calls=dict(calls),
        kernels=len(kernels),
        spills=sum(kernel.spills or 0 for kernel in kernels),
        not_compiled=[kernel.name for kernel in kernels if kernel.error],
        opaque=[name for name in calls if "ops.gdn." in name],
        cudagraph_skips=[reason for graph in graphs for reason in graph.cudagraph_skips],
    )


def size(tensors: Any) -> int:
    """Bytes."""
    return sum(x.numel() * x.itemsize for x in tensors)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of the model's parameters, and of a cache for one sequence."""

    dense: int  # parameters that every step reads: all but experts and embedding
    experts: int  # routed experts of all layers
    embedding: int  # of which a step reads a row for each token; 0 where it is the head too
    embedding_row: int
    recurrent: int  # states [HV, K, V] of all gated delta net layers
    convolution: int  # states of the convolutions
    kv_token: int  # keys and values of one token in all attention layers

    @property
    def weights(self) -> int:
        return self.dense + self.experts + self.embedding


def memory(model: Qwen3NextForCausalLM) -> Memory:
    named = dict(model.named_parameters())  # a tied embedding stands there once
    experts = [p for name, p in named.items() if ".mlp.experts." in name]
    embedding = model.get_input_embeddings().weight
    apart = 0 if model.config.tie_word_embeddings else size([embedding])
    layers = filled_cache(model, batch=1, context=1024).layers
    linear = [layer for layer in layers if hasattr(layer, "recurrent_states")]
    full = [layer for layer in layers if hasattr(layer, "keys")]
    return Memory(
        dense=size(named.values()) - size(experts) - apart,
        experts=size(experts),
        embedding=apart,
        embedding_row=size([embedding[0]]),
        recurrent=size(layer.recurrent_states[0] for layer in linear),
        convolution=size(layer.conv_states[0] for layer in linear),
        kv_token=size(x[:, :, 0] for layer in full for x in (layer.keys, layer.values)),
    )


def distinct_experts(experts: int, per_token: int, batch: int) -> float:
    """Expected number of experts of a layer that a batch of tokens touches.

    Each token picks ``per_token`` different ones of ``experts``, all equally likely, and
    independently of the other tokens: one is missed by all with ``(1 - per_token / experts) ** B``.
    """
    return experts * (1 - (1 - per_token / experts) ** batch)


@dataclasses.dataclass(frozen=True)
class Step:
    """A decode step of a batch: bytes that it must move at least, and how long that takes."""

    batch: int
    experts: float  # touched in each layer
    weights: int  # bytes read
    states: int  # bytes of recurrent and convolution states, read and written
    keys_values: int  # bytes of keys and values, those of the context read and one written
    held: int  # bytes that must be in memory
    milliseconds: float

    @property
    def moved(self) -> int:
        return self.weights + self.states + self.keys_values


def step(config: Qwen3NextConfig, held: Memory, batch: int, context: int) -> Step:
    touched = distinct_experts(config.num_experts, config.num_experts_per_tok, batch)
    weights = held.dense + round(held.experts * touched / config.num_experts)
    weights += batch * held.embedding_row
    per_sequence = held.recurrent + held.convolution
    states, keys_values = 2 * batch * per_sequence, batch * (context + 1) * held.kv_token
    return Step(
        batch=batch,
        experts=round(touched, 1),
        weights=weights,
        states=states,
        keys_values=keys_values,
        held=held.weights + batch * (per_sequence + context * held.kv_token),
        milliseconds=1e3 * (weights + states + keys_values) / H200_BANDWIDTH,
    )


def kernel_table(parts: Sequence[Inventory]) -> Table:
    names = {"gdn": "GDN layer", "attention": "attention layer", "model": "whole model"}
    title = "A decode step on an H200 (sm_90)"
    table = Table("", *(names[part.part] for part in parts), title=title)
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, values: Iterable[Any]) -> None:
        table.add_row(name, *(str(value) for value in values))

    def rows(label: str, counts: Sequence[dict[str, int]]) -> None:
        for name in sorted({name for count in counts for name in count}):
            # The operation in torch.ops.aten.sort.stable, gdn.recurrent_ and extern_kernels.mm.
            operation = [*name.removeprefix("torch.ops.").split("."), name][1]
            row(label.format(operation), (count.get(name, 0) for count in counts))

    row("graphs", (part.graphs for part in parts))
    rows("template {}", [part.templates for part in parts])
    rows("{} kernels", [part.other_kernels for part in parts])
    rows("library {}", [part.calls for part in parts])
    row("launches and calls", (part.length for part in parts))
    row("different kernels", (part.kernels for part in parts))
    row("not compiled", (len(part.not_compiled) for part in parts))
    row("spills", (part.spills for part in parts))
    row("left opaque", (len(part.opaque) for part in parts))
    row("CUDA graph skips", (len(part.cudagraph_skips) for part in parts))
    row("seconds, here", (part.seconds for part in parts))
    return table


def memory_table(held: Memory) -> Table:
    table = Table("", "MB", title="What it holds, in bfloat16; recurrent states in float32")
    table.columns[1].justify = "right"
    for name, count in {
        "weights": held.weights,
        "of these, routed experts": held.experts,
        "recurrent states of a sequence": held.recurrent,
        "convolution states of a sequence": held.convolution,
        "keys and values of 1000 tokens of a sequence": 1000 * held.kv_token,
    }.items():
        table.add_row(name, f"{count / 1e6:,.1f}")
    return table


def step_table(steps: Sequence[Step], context: int) -> Table:
    title = f"A decode step after {context} tokens, at least, at {H200_BANDWIDTH / 1e12} TB/s"
    columns = ("batch", "experts a layer", "weights, GB", "states, GB", "keys and values, GB")
    table = Table(*columns, "moved, GB", "held, GB", "ms", "tokens/s", title=title)
    for column in table.columns:
        column.justify = "right"
    for x in steps:
        sizes = (x.weights, x.states, x.keys_values, x.moved, x.held)
        table.add_row(
            str(x.batch),
            f"{x.experts:.1f}",
            *(f"{count / 1e9:.2f}" for count in sizes),
            f"{x.milliseconds:.2f}",
            f"{1e3 * x.batch / x.milliseconds:,.0f}",
        )
    return table


NOTES = """\
A layer has its experts with it. The experts touched are the expected number of different ones where
each token picks uniformly and independently. Not in the times: activations, launches, and what
passes between GPUs; N GPUs that share the bytes take 1/N of them. Attention is lowered as products
and a softmax: without a GPU, torch chooses no fused kernel for it."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--batch", type=int, default=64, help="sequences of the step that is lowered")
    add("--context", type=int, default=4096, help="tokens in the cache")
    add("--config", type=json.loads, default={}, help="JSON; sizes of another model")
    parts = [*KINDS, "model"]
    add("--parts", nargs="*", choices=parts, default=parts, help="what to lower; default: all")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    model = published_model(**arguments.config)
    held = memory(model)
    layout = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    parts = []
    with Progress(*layout, console=Console(stderr=True), transient=True) as progress:
        for part in arguments.parts:
            task = progress.add_task(f"lowering: {part}")
            parts.append(inventory(part, step_of(part, model, arguments.batch, arguments.context)))
            progress.remove_task(task)
    steps = [step(model.config, held, batch, arguments.context) for batch in BATCHES]

    if arguments.json:
        record = {
            "config": model.config.to_dict(),
            "batch": arguments.batch,
            "context": arguments.context,
            "parts": [dataclasses.asdict(part) for part in parts],
            "memory": dataclasses.asdict(held),
            "steps": [dataclasses.asdict(one) for one in steps],
        }
        json.dump(record, sys.stdout, indent=2)
        print()
        return
    console = Console()
    if parts:
        console.print(kernel_table(parts))
    console.print(memory_table(held), step_table(steps, arguments.context))
    console.print(NOTES, highlight=False)
    if held.weights > H200_MEMORY:
        console.print(
            f"The weights, {held.weights / 1e9:.0f} GB, do not fit one H200 of"
            f" {H200_MEMORY / 1e9:.0f} GB: it takes two, or 8-bit weights."
        )


if __name__ == "__main__":
    main()
