"""Speculative decoding of a hybrid model: several tokens a step, and the text of plain decoding.

    python examples/speculative.py                       the small Qwen3-Next beside this file
    python examples/speculative.py --model PATH_OR_NAME  any other Qwen3-Next checkpoint

Rows of real source text, which the small model was not trained on, are continued by a
``SpeculativeDecoder`` twice: with drafts from prompt lookup, and without any. Both steps are one
compiled graph, and both are measured in turn on the same texts. The plot shows how many tokens the
steps yielded on the way.
"""

import argparse
import json.decoder
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from generate import MODEL_DIRECTORY, device_name, language_of, load_model
from matplotlib.figure import Figure
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gdn_ops.speculative import PromptLookup, SpeculativeDecoder

PROMPT_FILE = Path(json.decoder.__file__)  # held out from training


class Run(NamedTuple):
    """What one pass over all rows was."""

    texts: list[Tensor]
    kept: Tensor  # tokens that each step yielded, [steps, rows]; 0 after the end of a row
    seconds: float  # of the steps

    @property
    def tokens(self) -> int:
        return int(self.kept.sum())

    @property
    def steps_of_rows(self) -> int:
        return int((self.kept > 0).sum())


def prompts_of(text: Tensor, rows: int, length: int) -> list[Tensor]:
    """Pieces ``[length]`` of a text, evenly spread."""
    starts = torch.linspace(0, max(0, len(text) - length), rows).long().tolist()
    return [text[start : start + length] for start in starts]


def run(decoder: SpeculativeDecoder, prompts: list[Tensor], new: int, progress: Progress) -> Run:
    """Continue every prompt by ``new`` tokens."""
    for row, prompt in enumerate(prompts):
        decoder.prefill(row, prompt, new)
    # The first token comes with the prompt.
    task = progress.add_task("", total=len(prompts) * (new - 1))
    kept: list[Tensor] = []
    lengths, seconds = decoder.lengths.clone(), 0.0
    while decoder.active.any():  # reading this waits for the device
        start = time.perf_counter()
        decoder.step()
        after = decoder.lengths.clone()
        kept.append((after - lengths).cpu())
        seconds += time.perf_counter() - start
        lengths = after
        progress.advance(task, int(kept[-1].sum()))
    progress.remove_task(task)
    return Run([decoder.text(row) for row in range(len(prompts))], torch.stack(kept), seconds)


def report(plain: list[Run], drafted: list[Run], k: int) -> Table:
    """One row for each way of decoding; rates are medians."""
    table = Table("", "drafts kept", "tokens a step and row", "steps/s", "tokens/s", "times")
    base = statistics.median(one.tokens / one.seconds for one in plain)
    for name, runs, count in (("plain", plain, 0), (f"{k} drafted tokens", drafted, k)):
        first = runs[0]
        each = first.tokens / first.steps_of_rows
        rate = statistics.median(one.tokens / one.seconds for one in runs)
        steps = statistics.median(len(one.kept) / one.seconds for one in runs)
        accepted = f"{(each - 1) / count:.0%}" if count else ""
        table.add_row(
            name, accepted, f"{each:.2f}", f"{steps:.0f}", f"{rate:.0f}", f"{rate / base:.2f}"
        )
    return table


def plot(one: Run, k: int, path: Path, window: int = 8) -> None:
    """Tokens per step of every row, each a running mean, and of all rows together."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for row in one.kept.T:
        own = row[row > 0].float()
        if len(own) >= window:
            axes.plot(own.unfold(0, window, 1).mean(1), alpha=0.5, linewidth=1)
    mean = one.tokens / one.steps_of_rows
    axes.axhline(mean, color="black", linestyle="--", label=f"mean of all steps: {mean:.2f}")
    axes.axhline(1, color="grey", label="plain decoding")
    axes.set(xlabel="step", ylabel="tokens per step", ylim=(0, k + 1.5))
    axes.set_title(f"{k} drafted tokens, {one.kept.shape[1]} rows, mean of {window} steps")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default=str(MODEL_DIRECTORY), help="folder or name of a Qwen3-Next checkpoint")
    add("--rows", type=int, default=4, help="texts that are continued together")
    add("--prompt-tokens", type=int, default=300, help="tokens of each prompt")
    add("--tokens", type=int, default=400, help="tokens to generate for each")
    add("--drafted", type=int, default=4, help="tokens drafted for each row and step")
    add("--repeats", type=int, default=3, help="measurements of each way of decoding")
    add("--eager", action="store_true", help="do not compile the steps")
    add("--plot", type=Path, default=Path("speculative.png"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    console = Console()
    model, language = load_model(arguments), language_of(arguments.model)
    text = language.encode(PROMPT_FILE.read_text())
    prompts = prompts_of(text, arguments.rows, arguments.prompt_tokens)
    k, new = arguments.drafted, arguments.tokens
    console.print(
        f"{model.num_parameters() / 1e6:.2f} M parameters, {arguments.dtype}, on "
        f"{device_name(model.device)}; torch {torch.__version__}"
    )
    mode = {"mode": "reduce-overhead"} if model.device.type == "cuda" else {}
    sizes = (model, arguments.rows, arguments.prompt_tokens + new)
    options = {"compile_options": None if arguments.eager else mode}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        SpeculativeDecoder(*sizes, 0, **options) as plain_decoder,
        SpeculativeDecoder(*sizes, k, PromptLookup(), **options) as decoder,
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
    ):
        total = progress.add_task("compiling", total=arguments.repeats + 1)
        for each in (plain_decoder, decoder):
            run(each, prompts, 8, progress)
        plain, drafted = [], []
        for i in range(arguments.repeats):
            progress.update(total, description="measuring in turn", completed=i + 1)
            plain.append(run(plain_decoder, prompts, new, progress))
            drafted.append(run(decoder, prompts, new, progress))
    same = all(map(torch.equal, plain[0].texts, drafted[0].texts))
    shown = Text(language.decode(prompts[0][-200:]), style="dim")
    generated = drafted[0].texts[0][len(prompts[0]) :].cpu()
    console.print(Panel(shown.append(language.decode(generated), style="not dim")))
    console.print(report(plain, drafted, k))
    console.print(f"texts of {plain[0].tokens} tokens identical: {'yes' if same else 'no'}")
    plot(drafted[0], k, arguments.plot)
    console.print(f"tokens per step over time: {arguments.plot}")


if __name__ == "__main__":
    main()
