"""The GPUs that code can be generated and compiled for on a machine without one, as data.

Sources: NVIDIA CUDA C++ Programming Guide 13, table of technical specifications by compute
capability; AMD CDNA 3 ISA and the MI300X data sheet. One product stands for each architecture.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Arch:
    """What kernels see of a GPU.

    Args:
        name: ``sm_90``, ``gfx942``.
        device: The product that stands for the architecture.
        major: First part of the compute capability.
        minor: Second part.
        multiprocessors: Streaming multiprocessors, or compute units.
        threads: Threads that fit a multiprocessor.
        ctas: Thread blocks that fit a multiprocessor.
        registers: 32-bit registers of a multiprocessor.
        shared_per_block: Shared memory that a block may ask for, bytes.
        shared: Shared memory of a multiprocessor, bytes.
        shared_reserved: Shared memory that the driver takes from each block, bytes.
        l2: Second-level cache, bytes.
        memory: Device memory, bytes.
        warp: Threads of a warp. Default: 32.
    """

    name: str
    device: str
    major: int
    minor: int
    multiprocessors: int
    threads: int
    ctas: int
    registers: int
    shared_per_block: int
    shared: int
    shared_reserved: int
    l2: int
    memory: int
    warp: int = 32

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def target(self) -> tuple[str, int | str, int]:
        """The arguments of ``triton.backends.compiler.GPUTarget``."""
        if self.is_amd:
            return "hip", self.name, self.warp
        return "cuda", self.major * 10 + self.minor, self.warp

    def device_properties(self) -> dict[str, Any]:
        """The attributes of ``torch.cuda.get_device_properties``."""
        return {
            "name": self.device,
            "major": self.major,
            "minor": self.minor,
            "multi_processor_count": self.multiprocessors,
            "max_threads_per_multi_processor": self.threads,
            "max_threads_per_block": 1024,
            "regs_per_multiprocessor": self.registers,
            "shared_memory_per_block": 64 << 10 if self.is_amd else 48 << 10,
            "shared_memory_per_block_optin": self.shared_per_block,
            "shared_memory_per_multiprocessor": self.shared,
            "L2_cache_size": self.l2,
            "total_memory": self.memory,
            "warp_size": self.warp,
            "gcnArchName": f"{self.name}:sramecc+:xnack-" if self.is_amd else None,
            "is_integrated": 0,
            "is_multi_gpu_board": 0,
        }


KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# fmt: off
# name, device, capability, multiprocessors, threads, blocks, registers,
# shared memory of a block, of a multiprocessor, reserved, L2, memory
ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", "NVIDIA A100", 8, 0, 108, 2048, 32, 65536,
             163 * KIB, 164 * KIB, KIB, 40 * MIB, 80 * GIB),
        Arch("sm_89", "NVIDIA L40S", 8, 9, 142, 1536, 24, 65536,
             99 * KIB, 100 * KIB, KIB, 96 * MIB, 48 * GIB),
        Arch("sm_90", "NVIDIA H200", 9, 0, 132, 2048, 32, 65536,
             227 * KIB, 228 * KIB, KIB, 60 * MIB, 141 * GIB),
        Arch("sm_100", "NVIDIA B200", 10, 0, 148, 2048, 32, 65536,
             227 * KIB, 228 * KIB, KIB, 126 * MIB, 180 * GIB),
        # 4 SIMDs with 8 wavefronts each; a lane has 512 vector registers of each SIMD.
        Arch("gfx942", "AMD Instinct MI300X", 9, 4, 304, 2048, 32, 131072,
             64 * KIB, 64 * KIB, 0, 4 * MIB, 192 * GIB, warp=64),
    )
}
# fmt: on


def find_arch(name: str) -> Arch:
    """The architecture of this name.

    Raises:
        ValueError: it is not known.
    """
    if name not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {name!r}")
    return ARCHS[name]
