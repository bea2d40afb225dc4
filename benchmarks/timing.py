"""Times on a GPU: of CUDA graphs over memory that no cache holds, and of calls from Python."""

import statistics
import time

import torch

from benchmarks.contender import Call
from benchmarks.rows import Row, bytes_moved

# Each copy of the inputs is a captured call; one token of one sequence moves 2 MB and needs most.
MOST_COPIES = 160


def copies(row: Row) -> int:
    """How many different inputs move more than four times the L2 cache, all together."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_COPIES, 4 * cache // bytes_moved(row) + 1))


def microseconds(calls: list[Call], replays: int = 20) -> list[float]:
    """Times of one call, from replays of a graph of all of them."""
    torch.cuda.synchronize()
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


def summary(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, in microseconds."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return {
        "us": round(statistics.median(ordered), 2),
        "p10": round(ordered[tenth], 2),
        "p90": round(ordered[-1 - tenth], 2),
    }


def graph_times(calls: list[Call]) -> dict[str, float]:
    """Microseconds of one call without the host: median, 10th and 90th percentile."""
    return summary(microseconds(calls))


def as_called(call: Call, prepare: Call, repeats: int = 5) -> tuple[list[float], list[float]]:
    """Microseconds of calls from Python until their results are there, from a cold L2 cache.

    The second list has those on the GPU alone: it is kept busy until the host has launched all, or
    as much as its queue holds. ``prepare`` runs before each call and is not timed.
    """
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    flushed = torch.empty(4 * cache, dtype=torch.int8, device="cuda")

    def cold() -> None:
        prepare()
        flushed.zero_()

    walls, times = [], []
    for i in range(repeats + 1):
        cold()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i:  # the host's caches have the code of another side the first time
            walls.append(1e6 * (time.perf_counter() - start))
    # Twice as long as the host needs at most, at 2 GHz.
    cycles = int(2 * statistics.median(walls) * 2000)
    for _ in range(repeats):
        cold()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        before.record()
        call()
        after.record()
        after.synchronize()
        times.append(1e3 * before.elapsed_time(after))
    return walls, times


def ceilings() -> dict[str, float]:
    """Bandwidth of an elementwise copy in TB/s, and TFLOP/s of a bfloat16 product."""
    a = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    copy = statistics.median(microseconds([lambda: torch.add(a, 1, out=b)], 10))
    x, y = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    z = torch.empty_like(x)
    product = statistics.median(microseconds([lambda: torch.mm(x, y, out=z)], 10))
    return {"copy TB/s": 4 * a.numel() / copy / 1e6, "mm TFLOP/s": 2 * 8192**3 / product / 1e6}
