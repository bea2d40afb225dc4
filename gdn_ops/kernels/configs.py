"""Tiles and warps of the kernels, as data."""

import triton


def recurrent_config(K: int, V: int, state_bytes: int) -> tuple[int, int]:
    """``BV`` and warps of ``recurrent_kernel``.

    Small tiles, one warp, many programs: 16 bytes a lane and 8 rows of 128 float32, or 16 of 16-bit
    numbers, moved 84 to 95 % of a copy's bandwidth at batches of 16 to 1024; larger tiles less
    (H200, torch 2.11, Triton 3.6, 2026-11-23).
    """
    elements = 4096 // state_bytes if state_bytes < 8 else 512
    BV = max(1, elements // triton.next_power_of_2(K))
    return min(BV, triton.next_power_of_2(V)), 1
