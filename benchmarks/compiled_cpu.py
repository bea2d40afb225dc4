"""A compiled decode step on a CPU: operators inlined, operators opaque, Hugging Face's functions.

    python benchmarks/compiled_cpu.py [--repeats N] [--threads N]

The three are compiled from functions of one step, which update the state in place, and called in
turn, in one process, on the same inputs. What is compared, and how, is in benchmarks/README.md.
"""

import argparse
import inspect
import itertools
import math
import os
import statistics
import time
import types
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

# What is inlined is no part of the key of a cache. Read when torch is imported.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import rich.box
import torch
from cpu import SAMPLE_SECONDS, processor
from rich.console import Console
from rich.table import Table
from sides_cpu import Row, hugging_face, make_inputs

import gdn_ops
import lowering
from lowering import cpu as cpu_rules

Step = Callable[..., torch.Tensor]

SIDES = ("inlined", "opaque", "theirs")
# As many different tokens as no component of a state can fade under them to a denormal number.
TOKENS = 64
W = 4
THEIR_RECURRENT = hugging_face()[1]


class Case(NamedTuple):
    operator: str
    B: int
    H: int
    HV: int
    K: int
    V: int
    state: torch.dtype
    dynamic: bool  # the batch, and no other size


SHAPES = ((1, 2, 4, 32, 64), (1, 16, 32, 128, 128), (16, 16, 32, 128, 128), (64, 16, 32, 128, 128))
CASES = (
    *(Case("recurrent_", *shape, torch.float32, False) for shape in SHAPES),
    Case("recurrent_", *SHAPES[2], torch.bfloat16, False),
    Case("recurrent_", *SHAPES[2], torch.float32, True),
    *(Case("causal_conv1d_", *shape, torch.float32, False) for shape in SHAPES),
    Case("causal_conv1d_", *SHAPES[2], torch.float32, True),
)


def our_recurrent(state: torch.Tensor, *tokens: torch.Tensor) -> torch.Tensor:
    return gdn_ops.recurrent_(*tokens, state, use_qk_l2norm=True)


def their_recurrent(state: torch.Tensor, *tokens: torch.Tensor) -> torch.Tensor:
    """As the model code calls it: their function, and the copy into the cache."""
    q, k, v, g, beta = tokens
    o, after = THEIR_RECURRENT(
        q,
        k,
        v,
        g=g,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    state.copy_(after)
    return o


def our_convolution(
    state: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return gdn_ops.causal_conv1d_(x, weight, bias, state, activation="silu")


def their_convolution(
    state: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """As the model code calls it; it keeps ``W`` inputs where ``W - 1`` suffice."""
    from transformers.models.qwen3_next import modeling_qwen3_next as model_code

    update = inspect.unwrap(model_code.causal_conv1d_update)
    return update(x.mT, state, weight, bias, "silu").mT


STEPS = {
    "recurrent_": (our_recurrent, their_recurrent),
    "causal_conv1d_": (our_convolution, their_convolution),
}


def inputs_of(case: Case, side: str) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """A state, and the arguments of ``TOKENS`` steps."""
    B, H, HV, K, V = case[1:6]
    if case.operator == "recurrent_":
        *tokens, state = make_inputs(Row(case.operator, B, TOKENS, H, HV, K, V))
        state = state.mT if side == "theirs" else state
        steps = zip(*(x.split(1, 1) for x in tokens), strict=True)
        steps = [[x.contiguous() for x in step] for step in steps]
        return state.contiguous().to(case.state), steps
    random = torch.Generator().manual_seed(0)
    D = 2 * H * K + HV * V
    taps, bias = torch.randn(D, W, generator=random), torch.randn(D, generator=random)
    x = torch.randn(TOKENS, B, 1, D, generator=random)
    state = torch.randn(B, D, W, generator=random)
    return state[..., 1:].contiguous() if side != "theirs" else state, [[y, taps, bias] for y in x]


def compiled(case: Case, side: str) -> Callable[[], torch.Tensor]:
    """A step of one side, compiled; each call takes the next token."""
    step = STEPS[case.operator][side == "theirs"]
    # Dynamo keeps what it compiled with the code object, which two sides share.
    step = types.FunctionType(step.__code__.replace(co_name=side), step.__globals__)
    state, steps = inputs_of(case, side)
    (lowering.unregister if side == "opaque" else lowering.register)()
    function = torch.compile(step, fullgraph=True, dynamic=None if case.dynamic else False)
    # Of large states too, which the lowering leaves to C.
    always = mock.patch.object(cpu_rules, "_MOST_INLINED", math.inf)
    if case.dynamic:
        for x in (state, *(x for step in steps for x in step)):
            if x.shape[0] == case.B:
                torch._dynamo.mark_dynamic(x, 0)
    next_tokens = itertools.cycle(steps)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return function(state, *next(next_tokens))

    # Compiled now, while the lowerings are as this side wants them.
    with always:
        call()
    return call


def check(case: Case, calls: dict[str, Callable[[], torch.Tensor]]) -> None:
    """All sides compute the same step, up to the rounding of a state and of sums.

    Raises:
        SystemExit: they do not. What is exact, the tests ask (tests/test_lowering_cpu.py).
    """
    outputs = [call() for call in calls.values()]
    allowed = 8 * case.K**0.5 * torch.finfo(case.state).eps * outputs[0].abs().max()
    for side, output in zip(SIDES, outputs, strict=True):
        if not (output - outputs[0]).abs().max() <= allowed:
            raise SystemExit(f"{case}: {side} differs from {SIDES[0]}")


def in_turn(
    calls: dict[str, Callable[[], torch.Tensor]], repeats: int, clock: Callable[[], float]
) -> list[float]:
    """Median seconds a call of each side; the sides take turns at going first."""

    def timed(side: str, number: int) -> float:
        start = clock()
        for _ in range(number):
            calls[side]()
        return (clock() - start) / number

    numbers = {side: math.ceil(SAMPLE_SECONDS / timed(side, 2)) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for repeat in range(repeats):
        for side in SIDES if repeat % 2 else reversed(SIDES):
            seconds[side].append(timed(side, numbers[side]))
    return [statistics.median(values) for values in seconds.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="samples of each side of a row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # The time of a single thread does not grow with what else runs on the machine.
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    lowering.register()
    table = Table("operator", "B H HV K V", "state", *SIDES, box=rich.box.SIMPLE, title="us a call")
    for case in CASES:
        torch._dynamo.reset()
        calls = {side: compiled(case, side) for side in SIDES}
        check(case, calls)
        times = [f"{1e6 * t:.0f}" for t in in_turn(calls, args.repeats, clock)]
        shape = " ".join(map(str, case[1:6])) + (", B dynamic" if case.dynamic else "")
        table.add_row(case.operator, shape, str(case.state).removeprefix("torch."), *times)
    console = Console()
    console.print(table)
    machine = f"{processor()}, {args.threads} threads of {os.cpu_count()} cores"
    console.print(f"{machine}, torch {torch.__version__}", highlight=False)


if __name__ == "__main__":
    main()
