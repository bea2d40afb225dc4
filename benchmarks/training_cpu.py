"""A training step of a small Qwen3-Next on a CPU, through the operators and as transformers has it.

    python benchmarks/training_cpu.py
    python benchmarks/training_cpu.py --batch 8 --length 256 --repeats 9

Forward, loss and backward of a hybrid of transformers, three gated delta net layers and one of
attention, three ways: with the operators under it, eager and compiled, and with the functions that
transformers runs where no kernel library is installed. Gradients are compared first; then the three
are called in turn, and each once in a process of its own, for its memory.
"""

import argparse
import contextlib
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import rich.box
import torch
import transformers
from cpu import processor, resident_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next

from gdn_ops.integrations.transformers import REPLACEMENTS, use_gdn_ops

SIDES = ("gdn_ops, compiled", "gdn_ops, eager", "Hugging Face, eager")

SIZES = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,  # linear, linear, linear, full
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 0,
}


def new_model() -> Qwen3NextForCausalLM:
    torch.manual_seed(0)
    return Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, use_cache=False))


@contextlib.contextmanager
def functions_of(side: str):
    """The functions of one side under the model code."""
    if side.startswith("gdn_ops"):
        with use_gdn_ops():
            yield
        return
    plain = {name: getattr(modeling_qwen3_next, name).__wrapped__ for name in REPLACEMENTS}
    with mock.patch.multiple(modeling_qwen3_next, **plain):
        yield


def new_step(side: str, model: Qwen3NextForCausalLM) -> Callable[[Tensor], list[Tensor]]:
    """A function from tokens ``[B, T]`` to the gradients of all parameters."""

    def loss(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    forward = torch.compile(loss, fullgraph=True, dynamic=True) if "compiled" in side else loss

    def step(tokens: Tensor) -> list[Tensor]:
        with functions_of(side):
            model.zero_grad()
            forward(tokens).backward()
        return [p.grad for p in model.parameters()]

    return step


def draw(batch: int, length: int) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (batch, length))


def check(steps: dict[str, Callable[[Tensor], list[Tensor]]], tokens: Tensor) -> None:
    """The sides have the same gradients; how accurate each is, tests/test_transformers*.py say."""
    *ours, theirs = ([x.clone() for x in steps[side](tokens)] for side in SIDES)
    for gradients in ours:
        for x, y in zip(gradients, theirs, strict=True):
            assert (x - y).abs().max() <= 1e-3 * y.abs().max(), "the gradients differ"


def times_in_turn(tokens: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds; with one thread of its own CPU time, which other processes lengthen less."""
    model = new_model()
    steps = {side: new_step(side, model) for side in SIDES}
    check(steps, tokens)
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    samples: dict[str, list[float]] = {side: [] for side in SIDES}
    for i in range(repeats):
        for side in SIDES[i % 3 :] + SIDES[: i % 3]:
            start = now()
            steps[side](tokens)
            samples[side].append(now() - start)
    return samples


def peak_of_one_step(side: str, batch: int, length: int) -> int:
    """Bytes by which a step raises this process's memory, gradients included; Linux only."""
    step = new_step(side, new_model())
    step(draw(batch, 80))  # to load the libraries and compile
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from now
    before = resident_bytes("VmRSS")
    step(draw(batch, length))
    return resident_bytes("VmHWM") - before


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--batch", type=int, default=4)
    add("--length", type=int, default=512, help="tokens of a row")
    add("--repeats", type=int, default=7)
    add("--threads", type=int, default=1)
    add("--measure", help=argparse.SUPPRESS)  # times, or the side whose memory is measured
    return parser.parse_args()


def in_a_process(what: str) -> object:
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", what]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = arguments.batch, arguments.length
    if arguments.measure:
        is_times = arguments.measure == "times"
        measured = (
            times_in_turn(draw(*shape), arguments.repeats)
            if is_times
            else peak_of_one_step(arguments.measure, *shape)
        )
        print(json.dumps(measured))
        return
    console = Console()
    count = sum(p.numel() for p in new_model().parameters())
    console.print(
        f"{count / 1e6:.2f} M parameters, float32, {shape[0]} x {shape[1]} tokens; {processor()},"
        f" {arguments.threads} threads; torch {torch.__version__}, transformers"
        f" {transformers.__version__}; {datetime.date.today()}"
    )
    seconds = in_a_process("times")
    table = Table("", "ms a step", "times as fast", "peak memory, MiB", box=rich.box.MARKDOWN)
    medians = {side: statistics.median(seconds[side]) for side in SIDES}
    for side in SIDES:
        peak = in_a_process(side) / 2**20
        ratio = medians[SIDES[-1]] / medians[side]
        table.add_row(side, f"{1e3 * medians[side]:.0f}", f"{ratio:.1f}", f"{peak:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
