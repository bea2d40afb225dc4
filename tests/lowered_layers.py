"""A Qwen3-Next layer in each phase of its life, and what its generated code consists of."""

import collections
import copy
import functools
import re

import pytest
import torch
import transformers
from tiny_models import HIDDEN, new_cache, tiny_model, tokens

import gdn_ops
from lowering.generated import kernel_origins

K, V = 32, 64

pinned = pytest.mark.skipif(
    not (torch.__version__.startswith("2.13.") and transformers.__version__.startswith("5.23.")),
    reason="the lists are those of torch 2.13 and transformers 5.23",
)

# Operations that say where a value lies, not what it is.
PLACES = {
    *("_to_copy", "_unsafe_view", "as_strided", "clone", "copy", "copy_", "expand", "permute"),
    *("slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unsqueeze", "view"),
}


@functools.cache
def model_of(dtype, experts=0, V=V):
    """A model of one GDN layer and one of attention."""
    return copy.deepcopy(tiny_model(K=K, V=V, layers=2, experts=experts)).to(dtype)


def hidden(B, T, dtype=torch.bfloat16, *, dynamic=False, seed=0):
    """What a layer reads; with ``dynamic`` of any batch, and of any length but 1."""
    x = torch.randn(B, T, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if dynamic:
        for dimension in (0, 1) if T > 1 else (0,):
            torch._dynamo.mark_dynamic(x, dimension)
    return x


@torch.no_grad()
def filled_cache(model, B, T=5):
    """A static cache after a prompt; its states are marked to stay at their addresses."""
    cache = new_cache("static", model, 32)
    model(tokens(B, T), past_key_values=cache)
    return cache


def block(layer, x, cache=None):
    """The decoder layer as its model calls it."""
    return layer(x, None, past_key_values=cache)


def verify(layer, x, conv_state, state, slots, table, accepted):
    """A verify step of a GDN layer, which transformers has not: ``x [N, S, HIDDEN]``."""
    query, key, value, z, b, a = layer.fix_query_key_value_ordering(
        layer.in_proj_qkvz(x), layer.in_proj_ba(x)
    )
    qkv = gdn_ops.causal_conv1d_(
        torch.cat([part.flatten(2) for part in (query, key, value)], -1),
        layer.conv1d.weight.squeeze(1),
        None,
        conv_state,
        slots,
        accepted,
        activation="silu",
    )
    q, k, v = qkv.split([layer.key_dim, layer.key_dim, layer.value_dim], -1)
    o = gdn_ops.recurrent_(
        q.unflatten(2, (-1, layer.head_k_dim)),
        k.unflatten(2, (-1, layer.head_k_dim)),
        v.unflatten(2, (-1, layer.head_v_dim)),
        gdn_ops.gdn_gate(a, layer.A_log, layer.dt_bias),
        b.sigmoid(),
        state,
        table,
        accepted,
        use_qk_l2norm=True,
    )
    o = layer.norm(o.flatten(0, 2), z.flatten(0, 2)).view_as(z)
    return layer.out_proj(o.flatten(2))


def verify_inputs(layer, N, S, dtype=torch.bfloat16):
    """Pools of more slots than are used, at fixed addresses."""
    conv_state = torch.randn(N + 2, layer.conv_dim, layer.conv_kernel_size - 1 + S - 1).to(dtype)
    state = torch.randn(N * S + 3, layer.num_v_heads, layer.head_v_dim, layer.head_k_dim)
    for pool in (conv_state, state):
        torch._dynamo.mark_static_address(pool, guard=False)
    slots = torch.arange(N, dtype=torch.int32)
    table = torch.arange(N * S, dtype=torch.int32).view(N, S)
    return conv_state, state, slots, table, torch.ones(N, dtype=torch.int32)


def inventory(module):
    """One line for each launch and library call of a graph, in order.

    A template is called by its name, another kernel by its kind and by the arithmetic that it does.
    """
    step = re.compile(r"\b(triton_\w+)\.run\(|\b((?:extern_kernels|torch\.ops)\.[\w.]+)\(")
    origins = kernel_origins(module.code)
    kernels = {launch.kernel.name: launch.kernel for launch in module.launches}
    lines = []
    for name, library in step.findall(module.code):
        if library:
            line = library
        elif kernels[name].kind == "template":
            line = f"template: {template_name(kernels[name])}"
        else:
            words = [word.removeprefix("aten.") for word in origins[name][1]]
            words = [word for word in words if word not in PLACES] or words
            line = f"{kernels[name].kind.replace('persistent_', '')}: {' '.join(words)}"
        lines.append(line)
    return "\n".join(lines)


def template_name(kernel):
    """The name that a template's text bears in its legend."""
    return re.search(r"# (gdn_\w+):", "".join(kernel.fn.raw_src))[1]


def template_names(module):
    return [
        template_name(launch.kernel)
        for launch in module.launches
        if launch.kernel.kind == "template"
    ]


def kernels_on(module, tensor):
    """Launches that are given memory of a tensor's size and dtype, be it the tensor or a copy."""
    return [
        template_name(launch.kernel) if launch.kernel.kind == "template" else launch.kernel.name
        for launch in module.launches
        if any(
            isinstance(x, torch.Tensor) and (x.numel(), x.dtype) == (tensor.numel(), tensor.dtype)
            for x in launch.args.values()
        )
    ]


def summary(module):
    """How much of what a graph has: its templates in order, its kernels by kind, its calls."""
    lines = inventory(module).split("\n")
    counts = collections.Counter(line.split(":")[0] for line in lines if "template" not in line)
    return "\n".join(
        [
            f"{module.phase}:",
            *(f"template {name}" for name in template_names(module)),
            *(f"{count} {name}" for name, count in sorted(counts.items())),
        ]
    )
