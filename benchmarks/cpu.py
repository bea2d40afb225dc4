"""The operators against Hugging Face's PyTorch functions on a CPU, both eager and compiled.

    python benchmarks/cpu.py [--repeats N] [--threads N] [--only NAME] [--json PATH]

All sides of a row are called in turn, in one process, on the same inputs, and so is what the
machine cannot do faster (``floor_cpu.py``); each row has a process of its own, and so has each
measurement of peak memory. Nothing is timed that a float64 loop over tokens does not confirm first.
What is compared, and how, is in benchmarks/README.md.
"""

import argparse
import datetime
import gc
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
import torch
from floor_cpu import FORMULA, SGEMM_FLOPS, move, multiply, work
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import gdn_ops

Tensors = tuple[torch.Tensor, ...]
Call = Callable[[], Tensors]

EAGER = ("ours", "theirs")
SIDES = ("ours", "ours_compiled", "theirs", "theirs_compiled")
# At most so many times what the machine cannot do faster.
FLOORS = 3
SYMBOLS = ("B", "T", "H", "HV", "K", "V")
# A sample calls often enough to last this long, so that the clock and one interrupt do not show.
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Row:
    """One comparison; ``speed`` and ``memory`` are the targets, None where there is none."""

    name: str  # prefill, train, decode_ (in place) or decode
    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    speed: float | None = None  # at least so many times as fast
    memory: float | None = None  # at most this part of the peak memory

    @property
    def shape(self) -> tuple[int, ...]:
        return self.B, self.T, self.H, self.HV, self.K, self.V

    @property
    def measures_memory(self) -> bool:
        return self.name in ("prefill", "train")


ROWS = (
    Row("prefill", 1, 2048, 16, 32, 128, 128, speed=2, memory=0.5),
    Row("prefill", 4, 256, 16, 32, 128, 128, speed=2, memory=0.5),
    Row("train", 4, 256, 16, 32, 128, 128),
    Row("train", 8, 512, 2, 4, 32, 32),
    Row("decode_", 1, 1, 16, 32, 128, 128, speed=1),
    Row("decode_", 16, 1, 16, 32, 128, 128, speed=5),
    Row("decode", 1, 1, 16, 32, 128, 128),
    Row("decode", 16, 1, 16, 32, 128, 128),
)


def hugging_face():
    """The two functions of the model code, without the dispatch to an installed library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that find no GPU
        from transformers.models.qwen3_next import modeling_qwen3_next as model_code
    functions = (
        model_code.torch_chunk_gated_delta_rule,
        model_code.torch_recurrent_gated_delta_rule,
    )
    return [getattr(function, "__wrapped__", function) for function in functions]


def make_inputs(row: Row) -> list[torch.Tensor]:
    """``q k v g beta`` and a V-major state: what a layer of the model passes on, in float32."""
    random = torch.Generator().manual_seed(0)
    B, T, H, HV, K, V = row.shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random)

    # A in [1, 16] and a time step of 0.001 to 0.1, as checkpoints are initialised.
    A = 1 + 15 * torch.rand(HV, generator=random)
    time_step = 10 ** (-3 + 2 * torch.rand(HV, generator=random))
    dt_bias = time_step + torch.log(-torch.expm1(-time_step))
    g = gdn_ops.gdn_gate(normal(B, T, HV), A.log(), dt_bias)
    beta = normal(B, T, HV).sigmoid()
    q, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, HV, V)
    return [q, k, v, g, beta, 0.1 * normal(B, HV, V, K)]


def make_output_gradients(row: Row) -> list[torch.Tensor]:
    """Of ``o`` and of a V-major final state, as the rest of a model would hand them back."""
    random = torch.Generator().manual_seed(1)
    B, T, _, HV, K, V = row.shape
    return [torch.randn(size, generator=random) for size in ((B, T, HV, V), (B, HV, V, K))]


def our_call(row: Row, inputs: list[torch.Tensor]) -> Call:
    *tokens, state = inputs
    if row.name == "decode_":
        return lambda: (gdn_ops.recurrent_(*tokens, state, use_qk_l2norm=True), state)
    function = gdn_ops.recurrent if row.name == "decode" else gdn_ops.chunk
    return lambda: function(*tokens, state, use_qk_l2norm=True)


def their_call(row: Row, inputs: list[torch.Tensor]) -> Call:
    chunked, recurrent = hugging_face()
    function = chunked if row.name in ("prefill", "train") else recurrent
    q, k, v, g, beta, state = inputs
    # Their state is K-major: a contiguous one, but a view where the gradient of ours is wanted.
    keywords = {
        "g": g,
        "beta": beta,
        "initial_state": state.mT if state.requires_grad else state.mT.contiguous(),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }
    return lambda: function(q, k, v, **keywords)


def make_call(row: Row, side: str, inputs: list[torch.Tensor]) -> Call:
    """A call of one side; it returns the outputs and, for training, the gradients."""
    forward = (our_call if side.startswith("ours") else their_call)(row, inputs)
    if side.endswith("_compiled"):
        forward = torch.compile(forward, fullgraph=True, dynamic=False)

    def inference() -> Tensors:
        with torch.no_grad():
            return forward()

    if row.name != "train":
        return inference
    do, dstate = make_output_gradients(row)
    dstate = dstate if side.startswith("ours") else dstate.mT.contiguous()

    def training() -> Tensors:
        results = forward()
        return *results, *torch.autograd.grad(results, inputs, (do, dstate))

    return training


def exact_answer(row: Row, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same in float64, token by token, from the formula."""
    inputs = [x.detach().double().requires_grad_(row.name == "train") for x in inputs]
    q, k, v, g, beta, S = inputs
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    repeats = row.HV // row.H
    q = q.repeat_interleave(repeats, 2) * row.K**-0.5
    k = k.repeat_interleave(repeats, 2)
    outputs = []
    for t in range(q.shape[1]):
        S = g[:, t, :, None, None].exp() * S
        u = beta[:, t, :, None] * (v[:, t] - (S @ k[:, t, :, :, None]).squeeze(-1))
        S = S + u[..., :, None] * k[:, t, :, None, :]
        outputs.append((S @ q[:, t, :, :, None]).squeeze(-1))
    o = torch.stack(outputs, 1)
    if row.name != "train":
        return [o, S]
    gradients = [x.double() for x in make_output_gradients(row)]
    return [o, S, *torch.autograd.grad((o, S), inputs, gradients)]


def largest(x: torch.Tensor) -> float:
    return x.detach().abs().max().item()


def check(row: Row) -> None:
    """Compare all sides with the exact answer, on two key heads and at most 100 tokens.

    Raises:
        SystemExit: an error is more than twice that of theirs in eager mode, beyond the rounding of
            a sum of ``K`` terms.
    """
    torch._dynamo.reset()
    small = Row(row.name, 1, min(row.T, 100), 2, 2 * row.HV // row.H, row.K, row.V)
    errors = {}
    for side in SIDES:
        inputs = [x.requires_grad_(row.name == "train") for x in make_inputs(small)]
        exact = exact_answer(small, inputs)
        o, final_state, *gradients = make_call(small, side, inputs)()
        answer = [o, final_state if side.startswith("ours") else final_state.mT, *gradients]
        errors[side] = [largest(x.double() - y) for x, y in zip(answer, exact, strict=True)]
    rounding = [row.K**0.5 * torch.finfo(torch.float32).eps * largest(x) for x in exact]
    for side in SIDES:
        for error, theirs, slack in zip(errors[side], errors["theirs"], rounding, strict=True):
            if not error <= 2 * theirs + slack:
                name = f"{row.name} {row.shape}: {side}"
                raise SystemExit(f"{name} is off by {error:.3g}, theirs by {theirs:.3g}")


def timed(call: Callable[[], object], number: int) -> float:
    # The time of a single thread does not grow with what else runs on the machine.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(number):
        call()
    return (clock() - start) / number


def times_in_turn(row: Row, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each side and of the machine; they take turns at going first."""
    calls: dict[str, Callable[[], object]] = {"move": move(row), "multiply": multiply()}
    for side in SIDES:
        inputs = [x.requires_grad_(row.name == "train") for x in make_inputs(row)]
        calls[side] = make_call(row, side, inputs)
    for call in calls.values():
        call()
    numbers = {s: math.ceil(SAMPLE_SECONDS / timed(call, 1)) for s, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    for repeat in range(repeats):
        for side in list(calls) if repeat % 2 else reversed(calls):
            seconds[side].append(timed(calls[side], numbers[side]))
    gc.enable()
    return seconds


def resident_bytes(field: str) -> int:
    """``VmRSS``, the memory in use now, or ``VmHWM``, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} in /proc/self/status")


def peak_of_one_call(row: Row, side: str) -> int:
    """Bytes by which one call raises this process's memory, the results included."""
    tiny = Row(row.name, 1, 64, 2, 2 * row.HV // row.H, row.K, row.V)
    for shape in (tiny, row):  # the first is to load the libraries
        inputs = [x.requires_grad_(row.name == "train") for x in make_inputs(shape)]
        call = make_call(shape, side, inputs)
        if shape is tiny:
            call()
    if not sys.platform.startswith("linux"):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from now
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


def in_a_process(row: Row, threads: int, *what: str) -> Any:
    """What ``measure`` returns for ``row`` in a fresh process.

    An allocator keeps what earlier calls freed: in the process of another row theirs may find its
    temporaries there instead of asking the system, and be four times as fast.
    """
    command = [sys.executable, __file__, "--threads", str(threads)]
    command += ["--measure", str(ROWS.index(row)), *what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(number: str, what: str, value: str) -> Any:
    """``times`` with ``value`` repeats, or ``peak`` of the side ``value``, of one row."""
    row = ROWS[int(number)]
    return times_in_turn(row, int(value)) if what == "times" else peak_of_one_call(row, value)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def summary(row: Row, seconds: dict[str, list[float]], peak: dict[str, int]) -> dict:
    """The numbers of a row, the ratios, and whether the targets are met."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    moved, flops = work(row)
    rates = {"bytes_per_second": moved / median["move"]}
    rates["flops_per_second"] = SGEMM_FLOPS / median["multiply"]
    floor = max(median["move"], flops / rates["flops_per_second"])
    speed = median["theirs"] / median["ours"]
    compiled = median["theirs_compiled"] / median["ours_compiled"]
    memory = peak["ours"] / peak["theirs"] if peak else None
    met = {}
    if row.speed is not None:
        met[f"at least {row.speed:g} times as fast"] = speed >= row.speed
    if row.memory is not None:
        met[f"at most {row.memory:g} of the peak memory"] = memory <= row.memory
    met["compiled, faster than theirs compiled"] = compiled > 1
    for side, how in (("ours", "eager"), ("ours_compiled", "compiled")):
        met[f"{how}, at most {FLOORS} floors"] = median[side] <= FLOORS * floor
    return {
        "row": row.name,
        "shape": dict(zip(SYMBOLS, row.shape, strict=True)),
        "seconds": seconds,
        "median_seconds": median,
        "bytes": moved,
        "flops": flops,
        "rates": rates,
        "floor_seconds": floor,
        "floors": {side: median[side] / floor for side in SIDES},
        "peak_bytes": peak,
        "speed": speed,
        "speed_compiled": compiled,
        "memory": memory,
        "targets": met,
    }


def show(console: Console, results: list[dict]) -> None:
    title = (
        "medians in ms, in brackets as multiples of the floor; peak memory of one call, ours/theirs"
    )
    table = Table(title=title, box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("row")
    for column in (" ".join(SYMBOLS), "floor", *(side.replace("_", "\n") for side in SIDES), "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    verdicts = []
    for result in results:
        name, shape = result["row"], " ".join(map(str, result["shape"].values()))
        median, floors = result["median_seconds"], result["floors"]
        times = [f"{1e3 * median[side]:.2f} ({floors[side]:.1f})" for side in SIDES]
        peaks = "/".join(f"{p / 2**20:.0f}" for p in result["peak_bytes"].values())
        table.add_row(name, shape, f"{1e3 * result['floor_seconds']:.2f}", *times, peaks)
        for rule, met in result["targets"].items():
            verdicts.append(f"{'met   ' if met else 'MISSED'}  {name} {shape}: {rule}")
    console.print(table)
    console.print(FORMULA + "\n")
    console.print("\n".join(verdicts), highlight=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="samples of each side of a row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", help="only the rows of this name")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    rows = [row for row in ROWS if args.only in (None, row.name)]
    console = Console(width=None if sys.stdout.isatty() else 120)
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring in turn", total=len(rows))
        for row in rows:
            check(row)
            sides = EAGER if row.measures_memory else ()
            peak = {side: in_a_process(row, args.threads, "peak", side) for side in sides}
            seconds = in_a_process(row, args.threads, "times", str(args.repeats))
            results.append(summary(row, seconds, peak))
            progress.advance(task)
    show(console, results)
    import transformers

    machine = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gdn_ops": gdn_ops.__version__,
        "python": platform.python_version(),
    }
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    console.print(facts, highlight=False)
    if args.json:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        only = f" --only {args.only}" if args.only else ""
        command = (
            f"python -m benchmarks cpu --threads {args.threads} --repeats {args.repeats}{only}"
        )
        content = {"machine": machine, "date": date, "command": command, "rows": results}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
