"""Rows that ask one question: a state ``[V, K]`` against a state ``[K, V]``, all else the same.

Both layouts run the same arithmetic (``benchmarks.layout_kernels``), each with the fastest tile of
one short list. ``layout`` is a step of one token, ``layout_scan`` the serial part of a prefill.
"""

import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import exact
from benchmarks.cases import Case, make_case
from benchmarks.contender import Call, tokens_of
from benchmarks.entry import Entry, refuse
from benchmarks.report import V_MAJOR
from benchmarks.rows import CHUNK, HEADS, Heads, Row
from benchmarks.timing import copies, microseconds

NAMES = {V_MAJOR: True, "K-major": False}
Tile = dict[str, int]
Launch = Callable[[Tile], Tensor]
TILES: dict[str, tuple[Tile, ...]] = {
    "layout": tuple(
        {"BV": BV, "num_warps": num_warps}
        for BV, num_warps in ((8, 1), (16, 1), (32, 1), (32, 2), (64, 4), (128, 4))
    ),
    "layout_scan": tuple(
        {"BV": BV, "num_warps": num_warps, "num_stages": num_stages}
        for BV, num_warps, num_stages in ((32, 4, 2), (64, 4, 2), (64, 4, 3), (128, 8, 2))
    ),
}


def inverses(k: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """``(I + A)^-1 diag(beta)`` of each chunk and ``g`` summed in it, in float32.

    ``A[i, j] = beta[i] exp(g[i] - g[j]) k[i] . k[j]`` for ``j < i``. One sequence at a time: the
    matrices of a thousand do not fit.
    """
    inverse = g.new_empty(*g.shape, CHUNK)
    sums = g.unflatten(1, (-1, CHUNK)).cumsum(2)
    for n in range(len(k)):
        keys = k[n].float().unflatten(0, (-1, CHUNK)).transpose(1, 2)  # [chunks, H, BT, K]
        keys = keys.repeat_interleave(g.shape[2] // k.shape[2], 1)
        G, b = (x.transpose(1, 2) for x in (sums[n], beta[n].unflatten(0, (-1, CHUNK))))
        decay = (G[..., :, None] - G[..., None, :]).tril(-1).exp()
        A = (b[..., None] * decay * (keys @ keys.mT)).tril(-1)
        eye = torch.eye(CHUNK, device=k.device).expand_as(A)
        solved = torch.linalg.solve_triangular(A + eye, torch.diag_embed(b), upper=False)
        inverse[n] = solved.transpose(1, 2).flatten(0, 1)
    return inverse, sums.flatten(1, 2)


def make_launch(row: Row, case: Case, v_major: bool) -> tuple[Tensor, Tensor, Launch]:
    """The output, the states that are updated, and a launch that takes a tile."""
    from benchmarks import layout_kernels

    q, k, v, g, beta = tokens_of(case)
    (N, T, H, K), (HV, V) = q.shape, v.shape[2:]
    o = torch.empty_like(v)
    states = case.pool[:N] if v_major else case.pool[:N].mT.contiguous()
    sizes = {"scale": K**-0.5, "H": H, "HV": HV, "K": K, "V": V, "V_MAJOR": v_major}
    if row.name == "layout":
        tensors = [q, k, v, g, beta, states, o]
        kernel = layout_kernels.layout_step_kernel
    else:
        import triton.language as tl

        inverse, sums = inverses(k, g, beta)
        tensors = [q, k, v, sums, inverse.to(q.dtype), states, o, T]
        kernel = layout_kernels.layout_scan_kernel
        dot = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[q.dtype]
        sizes |= {"BT": CHUNK, "DOT": dot}

    def launch(tile: Tile) -> Tensor:
        kernel[V // tile["BV"], N * HV](*tensors, **sizes, **tile)
        return o

    return o, states if v_major else states.mT, launch


def small(row: Row) -> Row:
    return Row(row.name, min(row.N, 3), min(row.T, 2 * CHUNK), row.state)


@functools.cache
def check(v_major: bool, row: Row, heads: Heads, device: str) -> dict[str, float]:
    """Errors of every tile against float64, the largest of each result.

    Raises:
        Wrong: one is more than bfloat16 allows.
    """
    largest: dict[str, float] = {}
    for tile in TILES[row.name]:
        torch.manual_seed(0)
        case = make_case(row, heads, device)
        start = case.pool[: row.N].double()
        o, states = exact.delta_rule([x.double() for x in tokens_of(case)], start)
        actual, final, launch = make_launch(row, case, v_major)
        launch(tile)
        found = {"o": actual, "state": final}
        errors = exact.errors(found, {"o": o, "state": states[:, -1]})
        refuse(errors, exact.bound)
        largest = {name: max(e, largest.get(name, 0)) for name, e in errors.items()}
    return largest


def fastest(launches: list[Launch], tiles: tuple[Tile, ...]) -> list[Call]:
    """The calls with the tile that is the fastest of a few replays."""
    candidates = [[functools.partial(launch, tile) for launch in launches] for tile in tiles]
    return min(candidates, key=lambda calls: statistics.median(microseconds(calls, 7)))


def entries(row: Row, heads: Heads = HEADS, device: str = "cuda") -> list[Entry]:
    """Both layouts, on the same tokens and states."""
    cases: list[Case] = []

    def calls(v_major: bool) -> list[Call]:
        if not cases:
            torch.manual_seed(0)
            cases.extend(make_case(row, heads, device) for _ in range(copies(row)))
        launches = [make_launch(row, case, v_major)[2] for case in cases]
        return fastest(launches, TILES[row.name])

    return [
        Entry(
            name,
            functools.partial(check, v_major, small(row), heads, device),
            functools.partial(calls, v_major),
        )
        for name, v_major in NAMES.items()
    ]
