"""The operators on a GPU: decode, verify, prefill and training, against floors and a peer.

    python benchmarks/gpu.py [--only NAME] [--json PATH]

Each row is compared with a float64 loop over tokens first, on a small call of the same kind. Times
are medians of CUDA-graph replays, over pools and inputs that rotate through more than four times
the L2 cache. The peer is FLA where it is installed. What is measured, and how, is in
benchmarks/README.md.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import gdn_ops

H, HV, K, V = 16, 32, 128, 128


@dataclass(frozen=True)
class Row:
    """One measurement: ``N`` sequences of ``T`` tokens each."""

    name: str  # decode, verify, prefill or train
    N: int
    T: int
    state: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.state]
        return f"{self.name} {self.T}x{self.N} {dtype}"


ROWS = (
    *(Row("decode", N, 1) for N in (1, 16, 64, 256, 1024)),
    *(Row("decode", N, 1, torch.bfloat16) for N in (1, 16, 64, 256, 1024)),
    *(Row("verify", N, T) for N, T in ((16, 4), (64, 2), (64, 4), (64, 8), (256, 4))),
    *(Row("verify", N, T, torch.bfloat16) for N, T in ((64, 4), (256, 4))),
    *(Row("prefill", N, T) for N, T in ((1, 512), (1, 2048), (1, 8192), (1, 32768))),
    *(Row("prefill", N, T) for N, T in ((4, 2048), (8, 1024), (4, 8192))),
    *(Row("train", N, T) for N, T in ((1, 8192), (1, 32768), (4, 8192))),
)


def make_tokens(N: int, T: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """``q k v g beta``: unit keys and queries, decays as a model is initialised."""
    options = {"device": "cuda", "dtype": torch.float32}
    q, k = torch.nn.functional.normalize(torch.randn(2, N, T, H, K, **options), dim=-1).to(dtype)
    v = torch.randn(N, T, HV, V, **options).to(dtype)
    g = torch.nn.functional.logsigmoid(torch.randn(N, T, HV, **options)) / 16
    return [q, k, v, g, torch.rand(N, T, HV, **options)]


def make_pool(slots: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(slots, HV, V, K, device="cuda").mul_(0.1).to(dtype)


def our_call(row: Row) -> Callable[[], object]:
    """A call of its own inputs and pool."""
    tokens = make_tokens(row.N, row.T)
    if row.name == "decode":
        pool = make_pool(row.N, row.state)
        slots = torch.randperm(row.N, device="cuda", dtype=torch.int32)
        return lambda: gdn_ops.recurrent_(*tokens, pool, slots)
    if row.name == "verify":
        pool = make_pool(row.N * row.T, row.state)
        table = torch.randperm(row.N * row.T, device="cuda", dtype=torch.int32).view(row.N, row.T)
        accepted = torch.randint(1, row.T + 1, (row.N,), device="cuda", dtype=torch.int32)
        return lambda: gdn_ops.recurrent_(*tokens, pool, table, accepted)
    if row.name == "prefill":
        return lambda: gdn_ops.chunk(*tokens)
    leaves = [x.requires_grad_() for x in tokens]
    do = torch.randn_like(tokens[2])

    def train() -> object:
        o, _ = gdn_ops.chunk(*leaves)
        return torch.autograd.grad(o, leaves, do)

    return train


def fla_call(row: Row) -> Callable[[], object] | None:
    """The same by FLA, for the rows that it has."""
    if row.name not in ("prefill", "train"):
        return None
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except Exception:
        return None
    tokens = make_tokens(row.N, row.T)
    leaves = [x.requires_grad_(row.name == "train") for x in tokens]
    do = torch.randn_like(tokens[2])

    def call() -> object:
        o, state = chunk_gated_delta_rule(*leaves, output_final_state=row.name == "prefill")
        return torch.autograd.grad(o, leaves, do) if row.name == "train" else (o, state)

    return call


def bytes_moved(row: Row) -> float:
    """The least traffic: tokens and outputs once, a state read once, written where it must be."""
    token = (2 * H * K + 2 * HV * V) * 2 + 2 * HV * 4
    states = {"decode": 2, "verify": 1 + row.T, "prefill": 1, "train": 0}[row.name]
    passes = 3 if row.name == "train" else 1
    return row.N * (row.T * token * passes + states * HV * V * K * row.state.itemsize)


def exact(tokens: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """``o`` and the last state by a float64 loop over tokens."""
    q, k, v, g, beta = (x.double() for x in tokens)
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    S = v.new_zeros(v.shape[0], HV, V, K)
    outputs = []
    for t in range(v.shape[1]):
        S = g[:, t, :, None, None].exp() * S
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("nhvk,nhk->nhv", S, k[:, t]))
        S = S + u[..., :, None] * k[:, t, :, None, :]
        outputs.append(torch.einsum("nhvk,nhk->nhv", S, q[:, t]) * K**-0.5)
    return torch.stack(outputs, 1), S


def check() -> dict[str, float]:
    """Relative errors of both forms against the loop; exits where one is beyond bfloat16."""
    tokens = make_tokens(2, 200)
    o, S = exact(tokens)
    errors = {}
    for function in (gdn_ops.chunk, gdn_ops.recurrent):
        actual = function(*tokens)
        for name, x, y in zip(("o", "state"), actual, (o, S), strict=True):
            error = ((x.double() - y).norm() / y.norm()).item()
            errors[f"{function.__name__} {name}"] = error
            if not error < 2 * torch.finfo(torch.bfloat16).eps:
                raise SystemExit(f"{function.__name__}: {name} is off by {error:.2g}")
    return errors


def rotating(make: Callable[[], Callable[[], object]], row: Row) -> list[Callable[[], object]]:
    """Calls with different memory, together more than four times the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(1, min(64, int(4 * cache / bytes_moved(row)) + 1))
    return [make() for _ in range(copies)]


def microseconds(calls: list[Callable[[], object]], replays: int = 20) -> list[float]:
    """Times of one call, from replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    return times


def ceilings() -> dict[str, float]:
    """Bandwidth of an elementwise copy in TB/s, and TFLOP/s of a bfloat16 product."""
    a = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    copy = statistics.median(microseconds([lambda: torch.add(a, 1, out=b)], 10))
    x, y = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    z = torch.empty_like(x)
    product = statistics.median(microseconds([lambda: torch.mm(x, y, out=z)], 10))
    return {"copy TB/s": 4 * a.numel() / copy / 1e6, "mm TFLOP/s": 2 * 8192**3 / product / 1e6}


def measure(row: Row, copy: float) -> dict:
    ours = microseconds(rotating(lambda: our_call(row), row))
    median = statistics.median(ours)
    result = {
        "row": str(row),
        "us": round(median, 2),
        "p10": round(sorted(ours)[len(ours) // 10], 2),
        "p90": round(sorted(ours)[-1 - len(ours) // 10], 2),
        "floor_us": round(bytes_moved(row) / copy / 1e6, 2),
    }
    peer = fla_call(row)
    if peer is not None:
        try:
            theirs = statistics.median(microseconds([peer]))
            result |= {"fla_us": round(theirs, 2), "times": round(theirs / median, 2)}
        except Exception as error:
            result["fla"] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="only the rows of this name")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    torch.manual_seed(0)
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "python": platform.python_version(),
        "gdn_ops": gdn_ops.__version__,
    }
    limits = ceilings()
    print(machine, limits, check(), sep="\n", flush=True)
    results = []
    for row in ROWS:
        if args.only in (None, row.name):
            try:
                results.append(measure(row, limits["copy TB/s"]))
            except torch.cuda.OutOfMemoryError:
                results.append({"row": str(row), "failed": "out of memory"})
            print(" ".join(f"{k}={v}" for k, v in results[-1].items()), flush=True)
            torch.cuda.empty_cache()
    if args.json:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        command = " ".join(["python", *sys.argv])
        content = {"machine": machine, "ceilings": limits, "date": date, "command": command}
        args.json.write_text(json.dumps(content | {"rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
