"""Package a hybrid model ahead of time: ``torch.export``, then AOTInductor, states in place.

    python examples/export.py                       the small Qwen3-Next beside this file
    python examples/export.py --model PATH_OR_NAME --out FOLDER
    python examples/export.py --arch sm_90          also the kernels of a GPU that is not here

FOLDER gets ``prefill.pt2`` and ``decode.pt2``, which take any batch and length, and the shapes of
their states. A fresh process, ``run_exported.py``, loads them without transformers and must
generate the tokens of the eager model. docs/export.md says how to do it with another model.
"""

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from generate import MODEL_DIRECTORY, PROMPT_FILE, language_of, load_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3NextForCausalLM, StaticCache

from gdn_ops.integrations.transformers import use_gdn_ops
from lowering.fake_gpu import generate
from lowering.sass import compile_generated

RUNNER = Path(__file__).with_name("run_exported.py")

# A pair for each layer: states of convolution [B, D, W] and recurrence [B, HV, V, K], or keys and
# values [B, heads, context, head_dim].
States = list[tuple[Tensor, Tensor]]


class Step(nn.Module):
    """Logits of the next token, from everything that a step reads; it writes ``states`` in place.

    An exported program has no objects that remember: so the cache of transformers is made anew in
    each call, around tensors that the caller owns. Whether it was used before is part of the
    program, which is why prefill and decode are two.
    """

    def __init__(self, model: Qwen3NextForCausalLM, context: int, *, used: bool) -> None:
        super().__init__()
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=context)
        with torch.no_grad():
            model(torch.zeros(1, 8, dtype=torch.long), past_key_values=self.cache)
        if not used:
            self.cache.reset()
        for layer in self.cache.layers:
            _put(layer, None, None, None)

    def forward(self, tokens: Tensor, length: Tensor, states: States) -> Tensor:
        """``tokens [B, T]``, and how many came before, ``length []``: to ``[B, vocabulary]``."""
        cache = copy.deepcopy(self.cache)
        for layer, pair in zip(cache.layers, states, strict=True):
            _put(layer, *pair, length)
        return self.model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]


def _put(layer: Any, first: Tensor | None, second: Tensor | None, length: Tensor | None) -> None:
    """Hand a layer of a cache its tensors."""
    if hasattr(layer, "recurrent_states"):
        # transformers counts [B, HV, K, V]; the memory stays V-major, as the operators want it.
        layer.conv_states[0] = first
        layer.recurrent_states[0] = None if second is None else second.mT
    else:
        layer.keys, layer.values, layer.cumulative_length = first, second, length


def new_states(model: Qwen3NextForCausalLM, batch: int, context: int) -> States:
    """The states before the first token: zeros."""
    cache = StaticCache(config=model.config, max_cache_len=context)
    with torch.no_grad():
        model(torch.zeros(batch, 8, dtype=torch.long), past_key_values=cache)
    pairs = []
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            pairs.append((layer.conv_states[0], layer.recurrent_states[0].mT))
        else:
            pairs.append((layer.keys, layer.values))
    return [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in pairs]


def example_inputs(model: Qwen3NextForCausalLM, tokens: int, context: int) -> tuple[Any, ...]:
    """Two rows: what is 1 in an example is 1 for ever."""
    ids = torch.zeros(2, tokens, dtype=torch.long)
    return ids, torch.tensor(0), new_states(model, 2, context)


def export_step(
    model: Qwen3NextForCausalLM, context: int, *, used: bool
) -> torch.export.ExportedProgram:
    """Decode, one token after others, where the cache was ``used``; else prefill."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    # transformers pads a prompt that is shorter than the convolution, which would be another graph.
    length = torch.export.Dim("length", min=model.config.linear_conv_kernel_dim, max=context)
    layers = len(model.config.layer_types)
    shapes = {
        "tokens": {0: batch} if used else {0: batch, 1: length},
        "length": None,
        "states": [({0: batch}, {0: batch})] * layers,
    }
    inputs = example_inputs(model, 1 if used else 8, context)
    step = Step(model, context, used=used)
    with torch.no_grad():
        return torch.export.export(step, inputs, dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def plain_experts(model: Qwen3NextForCausalLM) -> Iterator[None]:
    """Experts as plain products: the default is an operator of transformers, not of torch."""
    before = model.config._experts_implementation
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def package(
    model: Qwen3NextForCausalLM, out: Path, context: int, options: dict[str, Any] | None = None
) -> None:
    """Write the two packages, and what their caller must know, to a folder.

    ``options`` are settings of Inductor, as for ``torch.compile``.
    """
    out.mkdir(parents=True, exist_ok=True)
    with use_gdn_ops(model), plain_experts(model):
        for name, used in (("prefill", False), ("decode", True)):
            program = export_step(model, context, used=used)
            torch._inductor.aoti_compile_and_package(  # noqa: TID251 as torch documents it
                program, package_path=str(out / f"{name}.pt2"), inductor_configs=options
            )
        states = new_states(model, 1, context)
    facts = {
        "context": context,
        "shortest_prefill": model.config.linear_conv_kernel_dim,
        "states": [[[*x.shape[1:]] for x in pair] for pair in states],
        "dtypes": [[str(x.dtype).removeprefix("torch.") for x in pair] for pair in states],
    }
    (out / "states.json").write_text(json.dumps(facts, indent=1) + "\n")


def compile_for_gpu(
    model: Qwen3NextForCausalLM,
    out: Path,
    context: int,
    arch: str,
    steps: Sequence[str] = ("prefill", "decode"),
) -> list[tuple[str, int]]:
    """Write the modules and the compiled kernels of the steps; name and bytes of each file.

    They are those that a package would hold. The package itself needs CUDA's headers and libraries,
    to link the C++ that calls them.
    """
    model = copy.deepcopy(model).bfloat16()
    files = []
    with use_gdn_ops(model), torch.no_grad():
        for name in steps:
            used = name == "decode"
            inputs = example_inputs(model, 1 if used else 64, context)
            for pair in inputs[2]:
                for state in pair:
                    torch._dynamo.mark_dynamic(state, 0)
            for dimension in (0,) if used else (0, 1):
                torch._dynamo.mark_dynamic(inputs[0], dimension)
            (module,) = generate(Step(model, context, used=used), inputs, arch=arch)
            folder = out / arch / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "module.py").write_text(module.code)
            for kernel in {one.kernel.name: one.kernel for one in module.launches}.values():
                binary = compile_generated(kernel, kernel.configs[0], arch).binary
                (folder / f"{kernel.name}.cubin").write_bytes(binary)
                files.append((f"{arch}/{name}/{kernel.name}.cubin", len(binary)))
    return files


@torch.no_grad()
def eager_tokens(model: Qwen3NextForCausalLM, prompt: Tensor, count: int, context: int) -> Tensor:
    """The next ``count`` most likely tokens, ``[B, count]``, by the model as it is."""
    cache = StaticCache(config=model.config, max_cache_len=context)
    tokens = [prompt]
    with use_gdn_ops(model):
        for _ in range(count):
            logits = model(tokens[-1], past_key_values=cache, logits_to_keep=1).logits
            tokens.append(logits.argmax(-1))
    return torch.cat(tokens[1:], 1)


def run_in_fresh_process(out: Path, prompt: Tensor, count: int) -> Tensor:
    command = [sys.executable, str(RUNNER), str(out), "--tokens", str(count)]
    done = subprocess.run(
        command, input=json.dumps(prompt.tolist()), stdout=subprocess.PIPE, text=True, check=True
    )
    return torch.tensor(json.loads(done.stdout))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default=str(MODEL_DIRECTORY), help="folder or name of a Qwen3-Next checkpoint")
    add("--out", type=Path, help="where the packages go; default: nowhere, they are only tried")
    add("--context", type=int, default=1024, help="tokens that a cache holds")
    add("--prompt-tokens", type=int, default=512, help="tokens of the prompt that is tried")
    add("--tokens", type=int, default=64, help="tokens to generate")
    add("--arch", help="sm_80, sm_89, sm_90, sm_100: write the kernels of such a GPU too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    console = Console()
    model = load_model(argparse.Namespace(model=arguments.model, dtype="float32", device="cpu"))
    language = language_of(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder)
        text = language.encode(PROMPT_FILE.read_text())[: arguments.prompt_tokens]
        half = len(text) // 2
        with console.status("exporting and compiling prefill and decode"):
            package(model, out, arguments.context)
        table = Table("prompts", "tokens", "identical to eager")
        for prompt in (text[None], torch.stack([text[:half], text[-half:]])):
            expected = eager_tokens(model, prompt, arguments.tokens, arguments.context)
            with console.status("generating in a fresh process"):
                actual = run_in_fresh_process(out, prompt, arguments.tokens)
            same = "yes" if torch.equal(actual, expected) else "no"
            table.add_row(" x ".join(map(str, prompt.shape)), str(arguments.tokens), same)
        console.print(table)
        if arguments.arch:
            with console.status(f"compiling kernels for {arguments.arch}"):
                files = compile_for_gpu(model, out, arguments.context, arguments.arch)
            kernels = Table(f"kernel for {arguments.arch}", "bytes")
            for name, count in files:
                kernels.add_row(name, str(count))
            console.print(kernels)


if __name__ == "__main__":
    main()
