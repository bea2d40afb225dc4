"""Train a small Qwen3-Next on the sources of Python's standard library, through ``torch.ops.gdn``.

It shows that the operators train: a Hugging Face ``Qwen3NextForCausalLM`` with linear and full
attention layers 3:1, grouped value heads, gated norms and a mixture of experts, whose gated delta
rule and convolution, forward and backward, are this package's operators. The checkpoint beside this
file came from

    python examples/train.py

The learning rate follows the clock, so that a slower machine ends in the same time, with fewer
steps. Each core is a process of one thread with its own part of the batch, which on small matrices
is faster than threads inside each product.
"""

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.distributed as dist
import torch.nn.functional as F
from byte_corpus import SEPARATOR, VOCABULARY, even_windows, load_corpus, random_windows
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from gdn_ops.integrations.transformers import use_gdn_ops

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODEL_DIRECTORY = Path(__file__).parent / "model"


class Log(NamedTuple):
    """What the plot shows, in nats per byte over minutes."""

    train: list[tuple[float, float]]
    held_out: list[tuple[float, float]]


def small_config(**changes: object) -> Qwen3NextConfig:
    """A Qwen3-Next of about 1.9 million parameters."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 160,
        "num_hidden_layers": 4,  # linear, linear, linear, full
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 192,
        "max_position_embeddings": 4096,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
        "initializer_range": 0.04,
        "pad_token_id": SEPARATOR,
        "bos_token_id": SEPARATOR,
        "eos_token_id": SEPARATOR,
    }
    return Qwen3NextConfig(**(sizes | changes))


def new_model(config: Qwen3NextConfig) -> Qwen3NextForCausalLM:
    """A model whose heads remember between ten and a thousand tokens at first.

    Hugging Face starts every ``dt_bias`` at one, where most heads forget within a token; here the
    step sizes are spread as in the Mamba-2 and FLA initialisation.
    """
    model = Qwen3NextForCausalLM(config)
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            heads = config.linear_num_value_heads
            dt = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
            inverse_softplus = dt + torch.log(-torch.expm1(-dt))
            layer.linear_attn.dt_bias.data = inverse_softplus
    return model


def orthogonal(x: Tensor) -> Tensor:
    """Roughly the nearest orthogonal matrix, ``[..., M, N]``, by five Newton-Schulz steps."""
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (2.0315 * square @ square - 4.775 * square) @ wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024), as large as a step of AdamW (Liu et al. 2025).

    In float32, and for stacks of matrices such as the experts; ``torch.optim.Muon`` has neither.
    """

    def __init__(self, params: list[nn.Parameter], lr: Tensor) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - momentum)
                update = orthogonal(p.grad.lerp(mean, momentum))
                p.mul_(1 - rate * group["weight_decay"])
                p.sub_(update * (0.2 * rate * max(p.shape[-2:]) ** 0.5))


def new_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices; AdamW for the embedding, convolutions, routers and vectors.

    Their learning rates are tensors: a number would be compiled into the step.
    """

    def is_matrix(name: str, p: Tensor) -> bool:
        return p.dim() >= 2 and min(p.shape[-2:]) >= 16 and "embed" not in name

    named = list(model.named_parameters())
    matrices = [p for name, p in named if is_matrix(name, p)]
    rest = [p for name, p in named if not is_matrix(name, p)]
    rate = torch.tensor(learning_rate)
    adam = torch.optim.AdamW(rest, rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(matrices, rate.clone()), adam]


def learning_rate_factor(progress: float) -> float:
    """Warm-up over the first 3 % of the run, then a cosine down to 2 %."""
    return min(1.0, progress / 0.03) * (0.51 + 0.49 * math.cos(math.pi * progress))


def loss_of(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of tokens ``[B, T + 1]``, nats per byte; and with the routers' own loss."""
    out = model(input_ids=tokens[:, :-1], use_cache=False, output_router_logits=True)
    nats = F.cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:].flatten())
    return nats, nats + model.config.router_aux_loss_coef * out.aux_loss


def average(x: Tensor) -> Tensor:
    """Average over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor) -> float:
    """Cross entropy over windows ``[N, T + 1]``, nats per byte; each process takes its share."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = windows[rank::world]
    total = sum(loss_of(model, tokens)[0] * len(tokens) for tokens in own.split(8))
    return average(torch.as_tensor(total)).item() * world / len(windows)


def flat_gradient(model: nn.Module) -> Tensor:
    """One tensor that holds the gradients of all parameters, each ``.grad`` a view of it."""
    parameters = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters))
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)
    return flat


def train(model: nn.Module, arguments: argparse.Namespace, rank: int) -> Log:
    """Train until the time, or the number of steps, is used up."""
    text, held_out = load_corpus()
    windows = even_windows(held_out, arguments.windows, arguments.length)
    generator = torch.Generator().manual_seed(arguments.seed + rank)
    optimizers, gradient = new_optimizers(model, arguments.learning_rate), flat_gradient(model)
    compute_loss, steps = loss_of, [optimizer.step for optimizer in optimizers]
    if arguments.compile:
        compute_loss = torch.compile(loss_of, fullgraph=True, backend=arguments.compile)
        steps = [torch.compile(step, backend=arguments.compile) for step in steps]
    log, start, step, next_look = Log([], []), time.monotonic(), 0, 0.0
    layout = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    bar = tqdm(total=100, bar_format=layout, disable=rank > 0)
    while True:
        minutes = (time.monotonic() - start) / 60
        progress = step / arguments.steps if arguments.steps else minutes / arguments.minutes
        progress = average(torch.tensor(progress)).item()  # all processes stop at the same step
        if progress >= min(next_look, 1):
            log.held_out.append((minutes, held_out_loss(model, windows)))
            next_look += 0.05
        if progress >= 1:
            bar.close()
            return log
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"].fill_(arguments.learning_rate * learning_rate_factor(progress))
        tokens = random_windows(text, arguments.batch, arguments.length, generator)
        nats, loss = compute_loss(model, tokens)
        loss.backward()
        average(gradient).mul_(1 / gradient.norm().clamp(min=1))  # clipped to norm 1
        for optimizer_step in steps:
            optimizer_step()
        gradient.zero_()
        step += 1
        log.train.append((minutes, nats.item()))
        bar.update(100 * progress - bar.n)
        losses = f"loss {nats.item():.3f}, held out {log.held_out[-1][1]:.3f}"
        bar.set_postfix_str(f"step {step}, {losses}")


def plot(log: Log, path: Path) -> None:
    """Loss over minutes, as a PNG."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    minutes, nats = (torch.tensor(x) for x in zip(*log.train, strict=True))
    smooth = F.avg_pool1d(nats[None], min(25, len(nats)), 1)[0]
    axes.plot(minutes, nats, color="tab:blue", alpha=0.2, linewidth=0.7)
    late = minutes[-len(smooth) :]
    axes.plot(late, smooth, color="tab:blue", label="training, mean of 25 steps")
    held_out = {"color": "tab:orange", "label": "held-out files", "markersize": 4}
    axes.plot(*zip(*log.held_out, strict=True), "o-", **held_out)
    axes.set(xlabel="minutes", ylabel="nats per byte", title="Qwen3-Next through torch.ops.gdn")
    axes.set_ylim(0.9 * min(x for _, x in log.held_out), min(3.5, log.train[0][1]))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(model: nn.Module, log: Log, arguments: argparse.Namespace) -> str:
    """What was trained, in one line, with the held-out loss of the checkpoint as it was saved."""
    saved = Qwen3NextForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    _, held_out = load_corpus()
    nats = held_out_loss(saved, even_windows(held_out, 256, arguments.length))
    steps = len(log.train)
    return (
        f"{model.num_parameters() / 1e6:.2f} M parameters, {steps} steps, "
        f"{steps * arguments.processes * arguments.batch * arguments.length / 1e6:.2f} M bytes, "
        f"{log.train[-1][0]:.1f} minutes, held-out {nats:.4f} nats per byte, "
        f"{nats / math.log(2):.4f} bits per byte"
    )


def worker(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    """Train in one process of ``arguments.processes``; the first one writes the files."""
    torch.set_num_threads(max(1, arguments.threads // arguments.processes))
    torch.manual_seed(arguments.seed)  # the same weights everywhere
    if arguments.processes > 1:
        address = f"file://{rendezvous}"
        dist.init_process_group("gloo", address, rank=rank, world_size=arguments.processes)
    model = new_model(small_config(**arguments.config))
    with use_gdn_ops(model):
        log = train(model, arguments, rank)
        if rank == 0:
            model.to(torch.bfloat16).save_pretrained(arguments.out)
            plot(log, arguments.out / "loss.png")
        average(torch.zeros(1))  # wait until the files are there
        summary = report(model, log, arguments)
    if rank == 0:
        print(summary)
    if arguments.processes > 1:
        dist.destroy_process_group()


def parse(argv: list[str] | None) -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=27, help="how long to train")
    add("--steps", type=int, help="train this many steps instead")
    add("--out", type=Path, default=MODEL_DIRECTORY, help="where the checkpoint goes")
    add("--batch", type=int, default=4, help="windows a step, in each process")
    add("--length", type=int, default=512, help="bytes in a window")
    add("--windows", type=int, default=64, help="held-out windows looked at while training")
    add("--learning-rate", type=float, default=1e-2)
    add("--processes", type=int, default=cores)
    add("--threads", type=int, default=cores, help="of all processes together")
    add("--seed", type=int, default=0)
    compiled = "compile forward, backward and the optimizers' steps"
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help=compiled)
    add("--config", type=json.loads, default={}, help="JSON; sizes of another model")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as directory:
        rendezvous = f"{directory}/rendezvous"
        if arguments.processes > 1:
            torch.multiprocessing.spawn(worker, (arguments, rendezvous), arguments.processes)
        else:
            worker(0, arguments, rendezvous)


if __name__ == "__main__":
    main()
