"""Which kernel scans a prefill: on Hopper chunk_scan_hopper.py's, where it serves a call."""

from typing import Any

from .chunk_scan import scan_kernel
from .configs import TRITON, Gpu

# Those of Triton whose Gluon compiles the kernel without a spill, 3.6.0 and 3.7.1 (cross-compiled,
# 2026-11-29; on an H200 it ran with 3.6.0). Gluon is experimental: another version is not tried.
GLUON = ((3, 6), (3, 7))


def has_gluon() -> bool:
    """Whether the Triton at hand is one of ``GLUON``."""
    return TRITON in GLUON


def serves(K: int, V: int, gpu: Gpu) -> bool:
    """Whether there are kernels in Gluon for these sizes, this GPU and the Triton at hand."""
    return gpu.arch == "sm_90" and (K, V) == (128, 128) and has_gluon()


def pick_rows(heads: int, gpu: Gpu) -> tuple[int, dict[str, Any]]:
    """``BV``, the rows of a state that a program walks, and options of one that walks and loads.

    One warp group has 64 rows, where all programs have a multiprocessor for themselves; else two
    share the tokens.
    """
    if 2 * heads > gpu.multiprocessors:
        return 128, {}
    # Of 8 warps, those of the roles, Triton would want 256 registers, which ptxas refuses.
    return 64, {"maxnreg": 240}


def pick_scan(
    tiles: Any, K: int, V: int, heads: int, gpu: Gpu, is_late: bool
) -> tuple[Any, Any, dict[str, Any]]:
    """The kernel, its tiles, and further options of Triton.

    us of a prefill of 32 heads, this scan / the plain one (H200, Triton 3.6, 2026-11-30): 512
    tokens 22 / 29, 8192 212 / 257, 2 x 4096 172 / 187; and on 2026-11-29 4 x 2048 172 / 174, 4 x
    8192 596 / 624.

    Args:
        tiles: Those of ``scan_kernel``.
        K: Key size.
        V: Value size.
        heads: States of the call: of sequences, or of segments.
        gpu: The GPU.
        is_late: Whether tokens come and the output goes by descriptors.
    """
    if not (serves(K, V, gpu) and tiles.BT == 64 and is_late):
        return scan_kernel, tiles, {}
    # Not at the top: a Triton without Gluon has the other kernel.
    from .chunk_scan_hopper import scan_hopper_kernel

    BV, options = pick_rows(heads, gpu)
    # Beside ``prepare_kernel``: 1 to 5 % of a prefill (H200, Triton 3.6, 2026-11-30).
    options |= {"launch_pdl": True}
    return scan_hopper_kernel, tiles._replace(BV=BV, num_warps=4, num_stages=3), options
