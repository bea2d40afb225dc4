"""What the launchers launch and the lowerings generate at a model's sizes, compiled for any GPU."""

import concurrent.futures
import dataclasses
import inspect
import multiprocessing
import pkgutil
import re

import torch
from torch.nn.functional import silu

import gdn_ops
from lowering.fake_gpu import generate
from lowering.sass import compile_generated, compile_kernel

H, HV, K, V = 16, 32, 128, 128


def new(*size, dtype=torch.bfloat16):
    return torch.empty(size, dtype=dtype, device="meta")


def integers(*size):
    return new(*size, dtype=torch.int32)


def states(N, dtype=torch.float32, K=K):
    return new(N, HV, V, K, dtype=dtype)


def tokens(B, T, dtype=torch.bfloat16, K=K, is_kda=False):
    """``q k v g beta``."""
    q, k, v = (
        new(B, T, H, K, dtype=dtype),
        new(B, T, H, K, dtype=dtype),
        new(B, T, HV, V, dtype=dtype),
    )
    return q, k, v, new(B, T, HV, *[K] * is_kda, dtype=torch.float32), new(B, T, HV, dtype=dtype)


def decode(q, k, v, a, b, A_log, dt_bias, pool, slots, z):
    g, beta = gdn_ops.gdn_gate(a, A_log, dt_bias), b.sigmoid()
    return gdn_ops.recurrent_(q, k, v, g, beta, pool, slots, use_qk_l2norm=True) * silu(z)


def prefill(q, k, v, g, beta, z, weight):
    o, state = gdn_ops.chunk(q, k, v, g, beta, use_qk_l2norm=True)
    return gdn_ops.rms_norm_gated(o, z, weight), state


def train(q, k, v, g, beta, z):
    return gdn_ops.chunk(q, k, v, g, beta, use_qk_l2norm=True)[0] * silu(z)


def convolve(x, weight, z):
    return gdn_ops.causal_conv1d(x, weight, activation="silu")[0] * z


def _decode_inputs(T):
    q, k, v, *_ = tokens(16, T)
    gates = (new(16, T, HV), new(16, T, HV), new(HV), new(HV))
    return q, k, v, *gates, states(33), integers(16), new(16, T, HV, V)


def _train_inputs():
    # Of bfloat16 the gradient is a call: it has kernels in Gluon, which are no templates.
    inputs = (*tokens(2, 1000, torch.float16), new(2, 1000, HV, V, dtype=torch.float16))
    return tuple(x.requires_grad_() for x in inputs)


def _convolve_inputs():
    return tuple(x.requires_grad_() for x in (new(2, 1000, 8192), new(8192, 4), new(2, 1000, 8192)))


# Layers for torch.compile: each with the templates that it becomes.
LAYERS = {
    "decode lowered": (decode, _decode_inputs(1)),
    "verify lowered": (decode, _decode_inputs(4)),
    # Of more tokens the operator would be called, whose kernels in Gluon are no templates.
    "prefill lowered": (prefill, (*tokens(16, 60), new(16, 60, HV, V), new(V))),
    "train lowered": (train, _train_inputs()),
    "convolve lowered": (convolve, _convolve_inputs()),
}
KERNELS = {
    "decode lowered": ("recurrent",),
    "verify lowered": ("recurrent_verify",),
    "prefill lowered": ("chunk_scan",),
    "train lowered": (
        "chunk_scan",
        "chunk_backward_replay",
        "chunk_backward_reverse",
        "chunk_backward_gradients",
    ),
    "convolve lowered": ("causal_conv1d", "causal_conv1d_backward"),
}


class Compiler:
    """Processes that compile, or this one does. What is asked for twice is compiled once."""

    def __init__(self, processes):
        self._pool = None
        self._asked = {}
        if processes:
            # torch has threads in this process, which is why it must not be forked.
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(processes, context)

    def ask(self, launch, arch):
        """A future of the facts of a launch."""
        typed, constants, divisible = launch.signature()
        name = f"{launch.fn.fn.__module__}:{launch.fn.fn.__name__}"
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        options |= {"arch": arch, "divisible": divisible, "options": launch.options}
        job = (name, typed, constants, options)
        return self._submit(repr(job), _compile, *job)

    def ask_for_layer(self, layer, arch):
        """A future of the facts of a layer's templates, by their names."""
        return self._submit((layer, arch), _generate, layer, arch)

    def _submit(self, key, *job):
        if key not in self._asked:
            if self._pool is None:
                self._asked[key] = concurrent.futures.Future()
                self._asked[key].set_result(job[0](*job[1:]))
            else:
                self._asked[key] = self._pool.submit(*job)
        return self._asked[key]

    def close(self):
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _compile(name, typed, constants, options):
    facts = compile_kernel(pkgutil.resolve_name(name), typed, constants, **options)
    return _without_text(facts)


def _generate(layer, arch):
    function, arguments = LAYERS[layer]
    facts = {}
    for module in generate(function, arguments, arch=arch):
        for launch in module.launches:
            source = inspect.getsource(launch.kernel.fn.fn)
            template = re.search(r"# gdn_(\w+): ", source)
            if template and template[1] in KERNELS[layer]:
                found = compile_generated(launch.kernel, launch.kernel.configs[0], arch)
                facts[template[1]] = _without_text(found)
    return facts


def _without_text(facts):
    """The text but for products of warp groups left out: half a megabyte less to send."""
    products = re.findall(r".*HGMMA.*", facts.assembly)
    return dataclasses.replace(facts, assembly="\n".join(products))
