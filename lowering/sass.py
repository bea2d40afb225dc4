"""What a Triton kernel becomes on a GPU that this machine does not have.

    facts = compile_kernel(kernel, {"x": "*fp32", "n": "i32"}, {"BLOCK": 1024}, arch="sm_90")
    assert facts.spills == 0 and facts.opcodes["LDG.128"]

Triton's own back ends compile to machine code; registers, spills, shared memory and opcodes are
read from it, with the disassembler of Triton's wheel or, for AMD, from the assembly. Needs triton
and not torch.
"""

import collections
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arch import Arch, find_arch

if TYPE_CHECKING:
    from .generated import Config, Kernel


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a compiled kernel.

    Args:
        depth: Loops that it lies in.
        opcodes: How often each occurs in it, without the loops in it.
    """

    depth: int
    opcodes: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Facts:
    """A compiled kernel.

    Args:
        arch: What it is compiled for.
        num_warps: Warps of a block, of all roles where they have roles.
        num_stages: Stages of software pipelines.
        registers: 32-bit registers of a thread, at the start where roles have their own; of AMD
            vector registers.
        stack: Local memory of a thread, bytes.
        spills: Instructions that load from local memory or store to it.
        spills_in_loops: Those of them that lie in a loop.
        shared: Shared memory of a block, bytes, static and dynamic.
        occupancy: Blocks that fit a multiprocessor at a time.
        limit: What lets no more of them fit: registers, shared memory, threads or blocks; on
            Blackwell its tensor memory counts as registers.
        instructions: Instructions in all.
        opcodes: How often each occurs; accesses to memory also by width, products by shape:
            ``LDG``, ``LDG.128``, ``LDSM.4``, ``HGMMA.64x64x16``.
        loops: The same for each innermost loop, in the order of the code.
        straight: The same for what lies in no loop.
        nest: All loops, in the order of the code.
        assembly: The text from which all this was read.
        binary: What a GPU loads: a cubin, on AMD an hsaco.
    """

    arch: str
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    spills: int
    spills_in_loops: int
    shared: int
    occupancy: int
    limit: str
    instructions: int
    opcodes: Mapping[str, int]
    loops: Sequence[Mapping[str, int]]
    straight: Mapping[str, int]
    nest: Sequence[Loop]
    assembly: str = dataclasses.field(repr=False)
    binary: bytes = dataclasses.field(repr=False)


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any] | None = None,
    *,
    arch: str = "sm_90",
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Facts:
    """Compile a kernel for a GPU, and tell what it became.

    Args:
        fn: What ``triton.jit`` made of a function, or ``gluon.jit``.
        signature: Type of each argument at run time, as ``"*bf16"``, ``"i32"``, ``"fp32"``.
        constants: Value of every other argument: constexprs, and tensors that are None.
        arch: As for ``lowering.fake_gpu.fake_gpu``. Default: ``sm_90``.
        num_warps: Warps of a block. Default: 4.
        num_stages: Stages of software pipelines. Default: 3.
        divisible: Arguments that Triton may take to be divisible by 16. Default: the pointers.
        options: Further options of Triton's back end. Default: none.

    Raises:
        ValueError: ``arch`` is not known, or an argument is neither typed nor constant.
        RuntimeError: TRITON_INTERPRET=1 is set, which leaves nothing to compile.
    """
    constants = dict(constants or {})
    missing = [name for name in _compilable(fn).arg_names if name not in {*signature, *constants}]
    if missing:
        raise ValueError(f"compile_kernel: signature must type {missing}, got {list(signature)}")
    if divisible is None:
        divisible = [name for name, kind in signature.items() if kind.startswith("*")]
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(_compilable(fn).arg_names)
        if name in divisible
    }
    chosen = {"num_warps": num_warps, "num_stages": num_stages, **(options or {})}
    return _compile(fn, signature, constants, attrs, chosen, find_arch(arch))


def compile_generated(kernel: "Kernel", config: "Config", arch: str) -> Facts:
    """The same for a kernel of a generated module, as Inductor's launcher would compile it."""
    typed = kernel.meta["signature"]
    constants = {**kernel.meta["constants"], **config.constants}
    # On AMD a config may also have options of the back end, as waves_per_eu.
    options = {name: constants.pop(name) for name in list(constants) if name not in typed}
    options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options["sanitize_overflow"] = False
    if not find_arch(arch).is_amd:
        options["debug"] = kernel.inductor_meta.get("assert_indirect_indexing", True)
    for name in ("enable_fp_fusion", "launch_pdl"):
        if name in kernel.meta:
            options[name] = kernel.meta[name]
    signature = {name: kind for name, kind in typed.items() if name not in constants}
    attrs = kernel.meta["configs"][0]
    return _compile(kernel.fn, signature, constants, attrs, options, find_arch(arch))


def _compilable(fn: Any) -> Any:
    from triton.runtime.jit import JITFunction

    while not isinstance(fn, JITFunction):
        inner = getattr(fn, "fn", None)
        if os.environ.get("TRITON_INTERPRET") == "1" or inner is None:
            raise RuntimeError(
                f"compile_kernel: fn must be a triton.jit function, and TRITON_INTERPRET unset, got"
                f" {type(fn).__name__}"
            )
        fn = inner
    return fn


def _compile(
    fn: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    attrs: Mapping[Any, Any],
    options: Mapping[str, Any],
    arch: Arch,
) -> Facts:
    import triton
    from triton.backends.compiler import GPUTarget

    fn = _compilable(fn)
    typed = {name: "constexpr" if name in constants else signature[name] for name in fn.arg_names}
    source = _source_class(fn)(fn, typed, dict(constants), dict(attrs))
    compiled = triton.compile(source, target=GPUTarget(*arch.target), options=dict(options))
    read = _read_amd if arch.is_amd else _read_nvidia
    return read(compiled, arch)


def _source_class(fn: Any) -> Any:
    """What Triton's compiler takes a function as: Gluon has its own."""
    from triton.compiler import ASTSource

    if not getattr(fn, "is_gluon", bool)():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _read_nvidia(compiled: Any, arch: Arch) -> Facts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        # Its analysis of data flow, which the text does not show, takes a third of the time.
        assembly = _tool("nvdisasm", "-c", "-ndf", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    code, loops = _parse(assembly, NVIDIA)
    shared = used["SHARED"] + compiled.metadata.shared
    warps = compiled.metadata.num_warps
    # Registers are handed out to warps in units of 256, and to four warps at a time.
    per_warp = -(-used["REG"] * arch.warp // 256) * 256
    resident = arch.registers // max(per_warp, 1) // 4 * 4
    # A multiprocessor of Blackwell has 512 columns of tensor memory, which a block may claim.
    if columns := getattr(compiled.metadata, "tmem_size", 0):
        resident = min(resident, 512 // columns * warps)
    occupancy, limit = _blocks(arch, warps, resident, shared)
    return Facts(
        registers=used["REG"],
        stack=used["STACK"],
        shared=shared,
        occupancy=occupancy,
        limit=limit,
        **_counts(code, loops, NVIDIA),
        **_described(compiled, arch, assembly),
    )


def _read_amd(compiled: Any, arch: Arch) -> Facts:
    assembly = compiled.asm["amdgcn"]
    used = {
        name: int(v) for name, v in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)
    }
    code, loops = _parse(assembly, AMD)
    shared = used["group_segment_fixed_size"] or compiled.metadata.shared
    registers = used["vgpr_count"]
    # A lane has 512 registers of each of four SIMDs, handed out in units of 8, to 8 waves at most.
    resident = 4 * min(8, 512 // max(-(-registers // 8) * 8, 8))
    occupancy, limit = _blocks(arch, compiled.metadata.num_warps, resident, shared)
    return Facts(
        registers=registers,
        stack=used["private_segment_fixed_size"],
        shared=shared,
        occupancy=occupancy,
        limit=limit,
        **_counts(code, loops, AMD),
        **_described(compiled, arch, assembly),
    )


def _tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def _blocks(arch: Arch, warps: int, resident_warps: int, shared: int) -> tuple[int, str]:
    """Blocks of so many warps that fit, where the registers let so many be resident; the limit."""
    fits = {
        "blocks": arch.ctas,
        "threads": arch.threads // arch.warp // warps,
        "registers": resident_warps // warps,
        "shared memory": arch.shared // max(shared + arch.shared_reserved, 1),
    }
    limit = min(fits, key=lambda name: fits[name])
    return fits[limit], limit


@dataclasses.dataclass(frozen=True)
class _Dialect:
    """How to read an assembly: patterns with the groups ``name`` (a label) and ``op``."""

    label: re.Pattern[str]
    instruction: re.Pattern[str]
    branch: re.Pattern[str]
    spill: re.Pattern[str]


NVIDIA = _Dialect(
    re.compile(r"^(?P<name>\.L_x_\d+):"),
    re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<op>[A-Z][A-Z0-9_.a-z]*)"),
    re.compile(r"\bBRA\b.*\((?P<name>\.L_x_\d+)\)"),
    re.compile(r"(LDL|STL)$"),
)
AMD = _Dialect(
    re.compile(r"^(?P<name>\.LBB\w+):"),
    re.compile(r"^\s+(?P<op>[a-z]+_[a-z0-9_]+)\b"),
    re.compile(r"\bs_c?branch\w*\s+(?P<name>\.LBB\w+)"),
    re.compile(r"scratch_(load|store)|buffer_(load|store)\w*_spill"),
)
MEMORY = re.compile(r"^(LDG|STG|LDS|STS|LDL|STL|LDGSTS)\.")
WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128)\b")
# Products by shape, waits for them, and matrices that an access to shared memory moves.
SHAPE = re.compile(r"^(HGMMA|HMMA|WARPGROUP)\.(\w+)|^(LDSM|STSM)\.\S*\.(\d)$")


def _parse(assembly: str, dialect: _Dialect) -> tuple[list[str], list[tuple[int, int]]]:
    """The opcodes in order, and the loops: first and last instruction of each."""
    code: list[str] = []
    labels: dict[str, int] = {}
    loops: dict[int, int] = {}
    for line in assembly.splitlines():
        if label := dialect.label.match(line):
            labels[label["name"]] = len(code)
        elif instruction := dialect.instruction.match(line):
            back = dialect.branch.search(line)
            start = labels.get(back["name"], len(code)) if back else len(code)
            # Triton's code ends in a branch to itself, which is no loop. Nor is a branch from past
            # the end: a wait that tries again lies there, and jumps back to where it was called.
            if start < len(code) and "EXIT" not in code[start:]:
                loops[start] = len(code)
            code.append(instruction["op"])
    return code, sorted(loops.items())


def _counts(code: list[str], loops: list[tuple[int, int]], dialect: _Dialect) -> dict[str, Any]:
    innermost = [
        (start, end)
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]
    # The innermost loop of each instruction: the widest come first, and are written over.
    owner = [-1] * len(code)
    by_width = sorted(range(len(loops)), key=lambda i: loops[i][0] - loops[i][1])
    for i in by_width:
        start, end = loops[i]
        owner[start : end + 1] = [i] * (end + 1 - start)
    own: dict[int, list[str]] = {i: [] for i in range(-1, len(loops))}
    for i, op in zip(owner, code, strict=True):
        own[i].append(op)
    spilling = [i for i, op in enumerate(code) if dialect.spill.match(op.split(".")[0])]
    return {
        "instructions": len(code),
        "opcodes": _tally(code),
        "loops": [_tally(code[start : end + 1]) for start, end in innermost],
        "straight": _tally(own[-1]),
        "nest": [
            Loop(sum(s <= start and end <= e for s, e in loops) - 1, _tally(own[i]))
            for i, (start, end) in enumerate(loops)
        ],
        "spills": len(spilling),
        "spills_in_loops": sum(owner[i] >= 0 for i in spilling),
    }


def _tally(code: list[str]) -> collections.Counter[str]:
    count = collections.Counter(op.split(".")[0] for op in code)
    for op in code:
        if memory := MEMORY.match(op + "."):
            width = WIDTH.search(op)
            count[f"{memory[1]}.{width[1] if width else '32'}"] += 1
        elif shape := SHAPE.match(op):
            count[".".join(part for part in shape.groups() if part)] += 1
    return count


def _described(compiled: Any, arch: Arch, assembly: str) -> dict[str, Any]:
    return {
        "arch": arch.name,
        "num_warps": compiled.metadata.num_warps,
        "num_stages": compiled.metadata.num_stages,
        "assembly": assembly,
        "binary": compiled.asm["hsaco" if arch.is_amd else "cubin"],
    }
