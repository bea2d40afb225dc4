"""The figures of a compiled kernel that are accepted and watched, and which way is worse."""

import collections
from collections.abc import Mapping
from typing import Any

from lowering.sass import Facts

# For each figure whether more of it is better (1), worse (-1), or only another thing (0), which is
# to be accepted as deliberate. Registers are those of a thread, shared memory is in bytes, and
# instructions and opcodes are counted in the main part of the code.
FIGURES = {
    "warps": 0,
    "stages": 0,
    "registers": -1,
    "spills": -1,
    "spills in loops": -1,
    "shared memory": -1,
    "programs per multiprocessor": 1,
    "limited by": 0,
    "instructions": -1,
    "main part": 0,
}
OPCODES = {
    # Tensor cores: what they do is the algorithm's; that it is they who do it is the opcode's.
    "HGMMA": 0,
    "HMMA": -1,
    "UTMALDG": 0,
    "UTMASTG": 0,
    "LDGSTS": 0,
    "LDG.128": -1,
    "LDG.64": -1,
    "LDG.32": -1,
    "LDG.U16": -1,
    "STG.128": -1,
    "STG.64": -1,
    "STG.32": -1,
    "STG.U16": -1,
    "LDS.128": -1,
    "LDS.64": -1,
    "LDS.32": -1,
    "LDS.U16": -1,
    "STS.128": -1,
    "STS.64": -1,
    "STS.32": -1,
    "STS.U16": -1,
    "LDSM": -1,
    "STSM": -1,
    "LDL": -1,
    "STL": -1,
    "SHFL": -1,
    "BAR": -1,
    "FENCE": -1,
    "WARPGROUP.DEPBAR": -1,
    "FFMA": -1,
    "FMUL": -1,
    "FADD": -1,
    "MUFU": -1,
    "DFMA": -1,
    "DMUL": -1,
    "DADD": -1,
}
# Figures of an operator.
OPERATORS = {"launches": -1, "bytes a token": -1, "least bytes a token": 0, "predicted us": -1}
DIRECTIONS = FIGURES | OPCODES | OPERATORS
# Loops of fewer instructions wait for a barrier.
LEAST_LOOP = 8
# Loops are what a kernel is about where this share of its code is in them.
LEAST_SHARE = 1 / 8


def count(opcodes: Mapping[str, int]) -> int:
    """Instructions of a tally, which has some of them once more in detail."""
    return sum(n for op, n in opcodes.items() if "." not in op)


def main_part(facts: Facts) -> tuple[str, Mapping[str, int]]:
    """All that is in loops, each instruction once; all there is where that is little of it."""
    loops: collections.Counter[str] = collections.Counter()
    for loop in facts.nest:
        if count(loop.opcodes) >= LEAST_LOOP:
            loops.update(loop.opcodes)
    is_main = count(loops) >= LEAST_SHARE * facts.instructions
    return ("loops", loops) if is_main else ("all", facts.opcodes)


def figures(facts: Facts) -> dict[str, Any]:
    """What is accepted of a kernel, by the names above."""
    name, part = main_part(facts)
    return {
        "warps": facts.num_warps,
        "stages": facts.num_stages,
        "registers": facts.registers,
        "spills": facts.spills,
        "spills in loops": facts.spills_in_loops,
        "shared memory": facts.shared,
        "programs per multiprocessor": facts.occupancy,
        "limited by": facts.limit,
        "instructions": count(part),
        "main part": name,
        "opcodes": {op: part[op] for op in OPCODES if part.get(op)},
    }
