"""How long a launch takes on an H200, from its machine code: a model of pipes.

A warp instruction keeps its pipe in a quarter of a multiprocessor busy for ``32 / lanes`` cycles.
A program alone takes its **chain**, all its instructions one after another and what it waits for;
programs that share a multiprocessor take as long as their busiest pipe, but never less than one
chain. A launch takes the rounds of its programs or the transfer of its bytes, whichever is longer,
and a start. docs/performance.md has the sources of the numbers, and how far off the model is.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.static.figures import LEAST_LOOP, count
from benchmarks.static.launches import Launch, TorchLaunch
from benchmarks.static.traffic import bytes_moved
from gdn_ops.kernels.configs import cdiv
from lowering.arch import find_arch
from lowering.sass import Facts

ARCH = "sm_90"
QUARTERS = 4
# The clock at which the data sheet's 989 TFLOP/s are 132 multiprocessors of 4096 a cycle.
CLOCK = 1.83e9
# An elementwise copy, measured on the H200 whose times stand beside the model's.
BANDWIDTH = 4.25e12
# A launch in a CUDA graph, from the end of the one before to its first instruction.
START = 2e-6

# Pipe of an opcode, and for how many cycles a warp instruction keeps it busy in its quarter.
INTEGER = """IMAD IADD3 VIADD LEA LOP3 PRMT SHF SGXT BMSK SEL FSEL ISETP FSETP PLOP3 IMNMX VIMNMX
    FMNMX P2R R2P F2FP IABS"""
CYCLES: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("FFMA", "FMUL", "FADD"), ("fp32", 1)),
    **dict.fromkeys(INTEGER.split(), ("integer", 2)),
    **dict.fromkeys(("DFMA", "DMUL", "DADD", "DSETP"), ("fp64", 2)),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F"), ("special", 8)),
    "SHFL": ("shuffle", 4),
}
# Shared memory moves 128 bytes a cycle for all four quarters.
SHARED = {"U8": 4, "S8": 4, "U16": 4, "S16": 4, "32": 4, "64": 8, "128": 16}
# mma.sync reaches 63 % of the tensor cores' peak.
SYNCHRONOUS = 1 / 0.63
# What a program alone waits for at each, cycles.
WAITS = {"BAR": 30, "WARPGROUP.DEPBAR": 60}
# A read of memory that nothing was started ahead for: of the cache in a loop, of HBM before it.
CACHE_LATENCY, MEMORY_LATENCY = 270, 600


def _cycles(op: str) -> tuple[str, float] | None:
    """Pipe and cycles of an opcode, in detail where the tally has details."""
    if op in CYCLES:
        return CYCLES[op]
    name, _, detail = op.partition(".")
    if name in ("LDS", "STS", "LDGSTS") and detail:
        return "shared", SHARED[detail]
    if name in ("LDSM", "STSM") and detail:
        return "shared", 4 * int(detail)
    if name == "HGMMA" and (shape := re.match(r"64x(\d+)x", detail)):
        return "tensor", int(shape[1]) / 2
    if name == "HMMA" and (shape := re.match(r"16(8)(\d+)", detail)):
        # 4096 operations a cycle of 16-bit operands, whose products are 16 deep; half as many of
        # TF32, whose products are 8 or 4 deep.
        depth = int(shape[2])
        return "tensor", QUARTERS * (depth / 16) * (1 if depth == 16 else 2) * SYNCHRONOUS
    return None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cycles of one program: of each pipe of its multiprocessor, and of all in a row."""

    pipes: Mapping[str, float]
    chain: float

    @property
    def busiest(self) -> str:
        return max(self.pipes, key=lambda pipe: self.pipes[pipe])

    def of(self, programs: int) -> float:
        """Cycles that so many programs take together on a multiprocessor."""
        return max(self.chain, programs * self.pipes[self.busiest])


def _cost_of_part(opcodes: Mapping[str, int], warps: int, latency: float) -> Cost:
    """One pass through a part of the code."""
    found = {op: found for op in opcodes if (found := _cycles(op))}
    busy: dict[str, float] = {"issue": count(opcodes)}
    for op, (pipe, cycles) in found.items():
        busy[pipe] = busy.get(pipe, 0) + opcodes[op] * cycles
    # A warp of one quarter issues an instruction a cycle, and stands while a longer one passes.
    longer = sum(opcodes[op] * max(0, cycles - 1) for op, (_, cycles) in found.items())
    chain = (busy["issue"] + longer) * max(1, warps / QUARTERS)
    chain += sum(cycles * opcodes.get(op, 0) for op, cycles in WAITS.items())
    if opcodes.get("LDG"):
        chain += latency
    return Cost({pipe: n * warps / QUARTERS for pipe, n in busy.items()}, chain)


def _chunks(args: Mapping[str, Any]) -> tuple[int, ...]:
    return (cdiv(args["T"], args["BT"]),)


def _segment_chunks(args: Mapping[str, Any]) -> tuple[int, ...]:
    [chunks] = _chunks(args)
    if args["SEGMENTS"] == 1:
        return (chunks,)
    return (max(cdiv(chunks * args["B"], args["SEGMENTS"]), args["LEAST"]),)


def _segments(args: Mapping[str, Any]) -> tuple[int, ...]:
    return (cdiv(*_chunks(args), *_segment_chunks(args)),)


# How often a kernel passes its loops, by their depth; others are passed once.
def _tiles_and_heads(args: Mapping[str, Any]) -> tuple[int, ...]:
    """Chunks of key heads that a program has, and value heads of each."""
    tiles = args["B"] * args["chunks"] * args["H"]
    return cdiv(tiles, find_arch(ARCH).multiprocessors), args["HV"] // args["H"]


TRIPS: dict[str, Callable[[Mapping[str, Any]], tuple[int, ...]]] = {
    "recurrent": lambda args: (args["T"],),
    "carry": _segment_chunks,
    "carry_hopper": _segment_chunks,
    "chain": _segments,
    "scan": _segment_chunks,
    "scan_hopper": _segment_chunks,
    "fused_hopper": lambda args: (cdiv(args["T"], 64),),
    "chunk_replay": _chunks,
    "chunk_reverse": _chunks,
    "replay_hopper": _chunks,
    "reverse_hopper": _chunks,
    "gradients_hopper": _tiles_and_heads,
    "chunk_gradients": lambda args: (args["HV"] // args["H"], cdiv(args["V"], args["BV"])),
}


# Kernels that are launched to run while the one before does, and end after it.
BESIDE = {"scan_hopper": "prepare_beside", "reverse_hopper": "replay_hopper"}


def cost(launch: Launch, facts: Facts) -> Cost:
    """A program of a launch, from its first instruction to its last.

    Where warps have roles, each with the warps that the launch names, a loop is one role's, and all
    are walked at once.
    """
    find_trips = TRIPS.get(launch.kernel)
    trips = find_trips(launch.args) if find_trips else ()
    parts = [(1, _cost_of_part(facts.straight, launch.num_warps, MEMORY_LATENCY))]
    for loop in facts.nest:
        if count(loop.opcodes) >= LEAST_LOOP:
            # Where registers are handed out, warps wait for their roles, once.
            passes = 1 if "USETMAXREG" in loop.opcodes else math.prod(trips[: loop.depth + 1])
            parts.append((passes, _cost_of_part(loop.opcodes, launch.num_warps, CACHE_LATENCY)))
    pipes = {pipe for _, part in parts for pipe in part.pipes}
    straight, *loops = (n * part.chain for n, part in parts)
    have_roles = facts.num_warps > launch.num_warps
    return Cost(
        {pipe: sum(n * part.pipes.get(pipe, 0) for n, part in parts) for pipe in pipes},
        straight + (max(loops, default=0) if have_roles else sum(loops)),
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A launch of the model.

    Args:
        name: The kernel.
        seconds: How long it takes.
        bound: What it waits for: HBM, the chain of one program, or a pipe.
    """

    name: str
    seconds: float
    bound: str


def predict(launch: Launch | TorchLaunch) -> Prediction:
    """How long a launch takes on an H200, and why."""
    transfer = bytes_moved(launch) / BANDWIDTH
    if isinstance(launch, TorchLaunch):
        return Prediction(launch.name, START + transfer, "HBM")
    facts = launch.compile(ARCH)
    program = cost(launch, facts)
    share = cdiv(launch.programs, find_arch(ARCH).multiprocessors)
    rounds, rest = divmod(share, facts.occupancy)
    cycles = rounds * program.of(facts.occupancy) + (program.of(rest) if rest else 0)
    resident = min(share, facts.occupancy)
    bound = "chain" if program.of(resident) == program.chain else program.busiest
    if transfer >= cycles / CLOCK:
        bound = "HBM"
    return Prediction(launch.kernel, START + max(transfer, cycles / CLOCK), bound)


def duration(launches: Sequence[Launch | TorchLaunch]) -> float:
    """Seconds of launches in order; of two beside each other, which have room, the longer one's."""
    seconds = [predict(launch).seconds for launch in launches]
    saved = 0.0
    for i, launch in enumerate(launches):
        if isinstance(launch, TorchLaunch) or launch.kernel not in BESIDE:
            continue
        before, half = launches[i - 1], find_arch(ARCH).multiprocessors // 2
        is_beside = isinstance(before, Launch) and before.kernel == BESIDE[launch.kernel]
        if is_beside and launch.programs <= half:
            saved += min(seconds[i - 1 : i + 1])
    return sum(seconds) - saved
