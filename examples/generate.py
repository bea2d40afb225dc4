"""Generate text with a hybrid model that is compiled as one graph, through ``torch.ops.gdn``.

    python examples/generate.py                        the small Qwen3-Next beside this file
    python examples/generate.py --model PATH_OR_NAME   any other Qwen3-Next checkpoint

A Hugging Face ``Qwen3NextForCausalLM``, unchanged, continues real source text that it was not
trained on. Prefill and decode are compiled with ``fullgraph=True``. The table compares graphs,
tokens and times with the functions that transformers itself has for these layers; all four variants
run in turn in one process, on the same tokens. Below it stands which operators the compiled model
calls from outside; ``--kernels`` adds what it would consist of on an H200.
"""

import argparse
import collections
import contextlib
import copy
import functools
import json.decoder
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import byte_corpus
import torch
import transformers
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen3NextForCausalLM, StaticCache
from transformers.models.qwen3_next import modeling_qwen3_next

from gdn_ops.integrations.transformers import REPLACEMENTS, use_gdn_ops
from lowering.fake_gpu import generate
from lowering.generated import GeneratedModule, library_calls

MODEL_DIRECTORY = Path(__file__).parent / "model"

# A file of the standard library that training holds out.
PROMPT_FILE = Path(json.decoder.__file__)

# Two to six chunks of 64 tokens, on which transformers' own prefill depends.
LENGTHS = (80, 150, 220, 290, 360)


@contextlib.contextmanager
def hugging_face_functions() -> Iterator[None]:
    """Put transformers' own functions, in plain PyTorch, under the model code.

    Where FLA is installed, transformers would call that instead, which runs on a GPU only.
    """
    own = {name: getattr(modeling_qwen3_next, name) for name in REPLACEMENTS}
    plain = {name: getattr(function, "__wrapped__", function) for name, function in own.items()}
    with mock.patch.multiple(modeling_qwen3_next, **plain):
        yield


class Language(NamedTuple):
    """How a model's tokens are written as text, and back."""

    encode: Callable[[str], Tensor]
    decode: Callable[[Tensor], str]


def language_of(model: str) -> Language:
    """The checkpoint's own tokenizer; bytes for a folder that has none, as the small model's."""
    folder = Path(model)
    if folder.is_dir() and not (folder / "tokenizer_config.json").exists():
        return Language(byte_corpus.encode, byte_corpus.decode)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(text: str) -> Tensor:
        return tokenizer(text, return_tensors="pt").input_ids[0]

    return Language(encode, tokenizer.decode)


def prefill_step(
    model: Qwen3NextForCausalLM, tokens: Tensor, noise: Tensor, cache: StaticCache
) -> Tensor:
    logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
    return (logits + noise).argmax(-1)


def decode_step(
    model: Qwen3NextForCausalLM, token: Tensor, noise: Tensor, cache: StaticCache
) -> Tensor:
    return (model(token, past_key_values=cache).logits + noise).argmax(-1)


class Variant:
    """Prefill and decode of a model with one set of functions under it, eager or compiled."""

    def __init__(
        self, name: str, model: Qwen3NextForCausalLM, functions: Callable, *, compiled: bool
    ) -> None:
        self.name, self.model, self.functions, self.compiled = name, model, functions, compiled

        self._plain_prefill = self._prefill = functools.partial(prefill_step, model)
        self._decode = functools.partial(decode_step, model)
        if compiled:
            # Only one prompt length is run here. Transformers' functions are best compiled for it
            # alone; these operators need no such favour.
            dynamic = functions is use_gdn_ops
            self._prefill = torch.compile(self._prefill, fullgraph=True, dynamic=dynamic)
            self._decode = torch.compile(self._decode, fullgraph=True)

    def new_cache(self, length: int) -> StaticCache:
        return StaticCache(config=self.model.config, max_cache_len=length)

    @torch.inference_mode()
    def prefill(self, prompt: Tensor, noise: Tensor, cache: StaticCache) -> Tensor:
        """The token after a prompt ``[1, T]``: ``[1, 1]``; ``noise [vocabulary]``."""
        with self.functions():
            return self._prefill(prompt, noise, cache)

    @torch.inference_mode()
    def decode(self, token: Tensor, noise: Tensor, cache: StaticCache) -> list[Tensor]:
        """The tokens after ``token``, one for each row of ``noise [count, vocabulary]``."""
        tokens = []
        with self.functions():
            for row in noise:
                token = self._decode(token, row, cache)
                tokens.append(token)
        return tokens

    def generate(self, prompt: Tensor, noise: Tensor) -> Tensor:
        """The tokens after a prompt, one for each row of ``noise``: ``[count]``."""
        cache = self.new_cache(prompt.shape[1] + len(noise))
        first = self.prefill(prompt, noise[0], cache)
        return torch.cat([first, *self.decode(first, noise[1:], cache)], 1)[0]

    @torch.no_grad()
    def count_graphs(self, prompt: Tensor, lengths: tuple[int, ...]) -> tuple[int, int]:
        """Graph breaks and graphs of ``torch.compile(dynamic=True)`` for texts of these lengths.

        The graphs are captured and not compiled further: their number is settled by then.
        """
        torch._dynamo.reset()
        counters.clear()
        prefill = torch.compile(self._plain_prefill, fullgraph=True, dynamic=True, backend="eager")
        with self.functions():
            for length in lengths:
                text = prompt[:, torch.arange(length) % prompt.shape[1]]
                prefill(text, torch.zeros(1, device=text.device), self.new_cache(2 * max(lengths)))
        return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


def opaque_calls(variant: Variant, prompt: Tensor, noise: Tensor) -> list[str]:
    """The operators of ``gdn`` that a compiled variant calls: for the others there is code."""
    # A cache of the length that was compiled for.
    cache = variant.new_cache(prompt.shape[1] + len(noise))
    seen = set()

    def spy(name: str, call: Callable, *args: Any, **keywords: Any) -> Any:
        seen.add(name)
        return call(*args, **keywords)

    with contextlib.ExitStack() as stack:
        # Generated code looks an operator up at each call.
        for name in (
            "causal_conv1d",
            "causal_conv1d_",
            "chunk",
            "chunk_",
            "recurrent",
            "recurrent_",
        ):
            operator = getattr(torch.ops.gdn, name)
            watched = functools.partial(spy, f"gdn.{name}", operator.default)
            stack.enter_context(mock.patch.object(operator, "default", watched))
        variant.decode(variant.prefill(prompt, noise[0], cache), noise[1:2], cache)
    return sorted(seen)


@torch.no_grad()
def kernels_on_h200(model: Qwen3NextForCausalLM, prompt: Tensor) -> list[str]:
    """What the graphs of prefill and decode consist of in bfloat16: generated, never run."""
    model = copy.deepcopy(model).bfloat16()
    prefill, decode = (functools.partial(step, model) for step in (prefill_step, decode_step))
    noise = torch.zeros(model.config.vocab_size)
    cache = StaticCache(config=model.config, max_cache_len=2 * prompt.shape[1])
    with use_gdn_ops():
        (first,) = generate(prefill, (prompt, noise, cache), dynamic=True)
        token = prefill(prompt, noise, cache)
        (then,) = generate(decode, (token, noise, cache), mode="reduce-overhead")
    return [f"prefill on an H200: {describe(first)}", f"decode on an H200: {describe(then)}"]


def describe(module: GeneratedModule) -> str:
    """How many launches a graph has of each kind of kernel, and which libraries it calls."""
    kinds = collections.Counter(
        launch.kernel.kind.removeprefix("persistent_") for launch in module.launches
    )
    counts = [f"{kinds[kind]} {kind} kernels" for kind in ("template", "pointwise", "reduction")]
    calls = [f"{count} {name}" for name, count in sorted(library_calls(module.code).items())]
    return f"{', '.join(counts)}; calls: {', '.join(calls)}"


class Times(NamedTuple):
    prefill: float  # milliseconds
    decode: float  # milliseconds a token


def draw_noise(arguments: argparse.Namespace, model: Qwen3NextForCausalLM) -> Tensor:
    """Gumbel noise ``[tokens, vocabulary]``.

    The token with the largest sum of logit and noise is a sample of the softmax. With the same
    noise every variant makes the same choices, unless its logits differ.
    """
    generator = torch.Generator().manual_seed(arguments.seed)
    uniform = torch.rand(arguments.tokens, model.config.vocab_size, generator=generator)
    return (arguments.temperature * -(-uniform.log()).log()).to(model.device)


def time_once(variant: Variant, prompt: Tensor, noise: Tensor) -> Times:
    """Prefill of a prompt, then a single token for each row of ``noise``."""

    def now() -> float:
        if prompt.is_cuda:
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    cache = variant.new_cache(prompt.shape[1] + len(noise))
    start = now()
    token = variant.prefill(prompt, noise[0], cache)
    middle = now()
    variant.decode(token, noise, cache)
    return Times(middle - start, (now() - middle) / len(noise))


def measure(variants: list[Variant], prompt: Tensor, noise: Tensor, repeats: int) -> list[Times]:
    """Median times of each variant, measured in turn."""
    samples: list[list[Times]] = [[] for _ in variants]
    for _ in tqdm(range(repeats), desc="measuring in turn", leave=False):
        for variant, own in zip(variants, samples, strict=True):
            own.append(time_once(variant, prompt, noise))
    return [Times(*(statistics.median(x) for x in zip(*own, strict=True))) for own in samples]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, IndexError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
        return f"{model}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def report(
    variants: list[Variant],
    tokens: list[Tensor],
    graphs: dict[Callable, tuple[int, int]],
    times: list[Times],
    prompt_length: int,
) -> Table:
    """One row a variant."""
    reference = tokens[[variant.name for variant in variants].index("Hugging Face eager")]
    table = Table(
        "",
        "graph breaks",
        f"graphs for {len(LENGTHS)} lengths",
        f"{len(reference)} tokens identical",
        f"prefill of {prompt_length}, ms",
        "decode, ms a token",
    )
    for variant, own, (prefill, decode) in zip(variants, tokens, times, strict=True):
        counts = map(str, graphs[variant.functions]) if variant.compiled else ("", "")
        same = "yes" if torch.equal(own, reference) else "no"
        table.add_row(variant.name, *counts, same, f"{prefill:.1f}", f"{decode:.2f}")
    return table


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default=str(MODEL_DIRECTORY), help="folder or name of a Qwen3-Next checkpoint")
    add("--prompt", default=PROMPT_FILE.read_text(), help="text; default: of the standard library")
    add("--prompt-tokens", type=int, default=512, help="tokens of the prompt at most")
    add("--tokens", type=int, default=256, help="tokens to generate")
    add("--temperature", type=float, default=0.7, help="0 takes the most likely token")
    add("--seed", type=int, default=0)
    add("--repeats", type=int, default=7, help="measurements of each variant")
    add("--kernels", action="store_true", help="add the kernels of an H200: a minute; needs no GPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    return parser.parse_args(argv)


def load_model(arguments: argparse.Namespace) -> Qwen3NextForCausalLM:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, arguments.dtype)
    model = Qwen3NextForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    return model.to(arguments.device).eval()


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    console = Console()
    model, language = load_model(arguments), language_of(arguments.model)
    prompt = language.encode(arguments.prompt)[None, : arguments.prompt_tokens].to(model.device)
    console.print(
        f"{model.num_parameters() / 1e6:.2f} M parameters, {arguments.dtype}, on "
        f"{device_name(model.device)}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    variants = [
        Variant("gdn_ops compiled", model, use_gdn_ops, compiled=True),
        Variant("gdn_ops eager", model, use_gdn_ops, compiled=False),
        Variant("Hugging Face eager", model, hugging_face_functions, compiled=False),
        Variant("Hugging Face compiled", model, hugging_face_functions, compiled=True),
    ]
    graphs = {}
    for variant in (variant for variant in variants if variant.compiled):
        with console.status(f"counting graphs: {variant.name}"):
            graphs[variant.functions] = variant.count_graphs(prompt, LENGTHS)
    torch._dynamo.reset()
    noise = draw_noise(arguments, model)
    tokens = []
    for variant in variants:
        with console.status(f"generating: {variant.name}"):
            tokens.append(variant.generate(prompt, noise).cpu())
    shown = Text(language.decode(prompt[0, -200:].cpu()), style="dim")
    console.print(Panel(shown.append(language.decode(tokens[0]), style="not dim")))
    times = measure(variants, prompt, noise[:32], arguments.repeats)
    console.print(report(variants, tokens, graphs, times, prompt.shape[1]))
    opaque = ", ".join(opaque_calls(variants[0], prompt, noise)) or "none"
    console.print(f"operators that stay opaque calls on {model.device.type}: {opaque}")
    if arguments.kernels:
        with console.status("generating code for an H200"):
            lines = kernels_on_h200(model, prompt)
        console.print(*lines, sep="\n")


if __name__ == "__main__":
    main()
