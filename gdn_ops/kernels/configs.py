"""Tiles and warps of the kernels, as data."""

import functools
from typing import NamedTuple

import torch
import triton

# Rows of a state that a program of chunk's scan owns, where they are not 64: with 64 a thread of
# four warps accesses local memory in the loop, 17 times on sm_100 and 16 on gfx942, with 32 never
# (cross-compiled, Triton 3.7.1, 2026-11-24). On sm_80, sm_89 and sm_90 64 rows spill nothing.
SCAN_BV = {"sm_100": 32, "gfx942": 32}
# Warps of prepare with several heads, where they are not 4: with 4 a thread spills on sm_100, 22
# times, with 8 never; with one head it is the other way round (cross-compiled, Triton 3.7.1).
PREPARE_WARPS = {"sm_100": 8}

# The release of Triton at hand, as (3, 6).
TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
# From which Triton on its assembler spills where there would be registers enough; from 3.9 on ptxas
# gets --regAllocOptLevel=2 for sm_90, against a fault of its own. A loop that needs nearly all
# registers has other tiles or another order there, without a spill (cross-compiled, Triton 3.8.0
# and 3.9.0, 2026-11-29; not timed): docs/performance.md, "Newer releases of Triton".
TIGHT = {"sm_90": (3, 8)}


class Gpu(NamedTuple):
    """What the choice of tiles depends on."""

    arch: str  # as sm_90 or gfx942
    multiprocessors: int
    has_descriptors: bool  # tensor descriptors are a feature of its hardware
    is_tight: bool = False  # by ``TIGHT``


def is_tight(arch: str) -> bool:
    """Whether the Triton at hand is one of ``TIGHT``."""
    return arch in TIGHT and TIGHT[arch] <= TRITON


def gpu_at(index: int | None) -> Gpu:
    """The GPU of this index; None is the interpreter."""
    if index is None:
        return Gpu("interpreter", 1, False)
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
        return Gpu(arch, properties.multi_processor_count, False)
    arch = f"sm_{properties.major}{properties.minor}"
    return Gpu(arch, properties.multi_processor_count, properties.major >= 9, is_tight(arch))


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. Triton's own function takes 5 us a call, this one 0.1."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than ``n``."""
    return 1 << max(n - 1, 0).bit_length()


class RecurrentTiles(NamedTuple):
    """Tiles of ``recurrent_kernel``, and how it writes the states."""

    BV: int
    num_warps: int
    stream: bool  # states are written past the caches


@functools.cache
def recurrent_tiles(K: int, V: int, state_bytes: int, heads: int | None) -> RecurrentTiles:
    """Small tiles, one warp, many programs: 16 bytes a lane.

    Rows of 128 numbers on an H200 (Triton 3.6, 2026-11-25, us for 1, 16, 64, 256 and 1024 rows of
    32 heads; the copy's floor is 1, 16, 64, 255, 1018 for float32, half for bfloat16):

        float32    4 rows, past the caches      3.2   19.2   69.8   274   1092
                   8 rows                       3.9   19.7   69.5   267   1061
                   16 rows                      4.2   20.6   71.1   272   1080
        bfloat16   4 rows, past the caches      2.6   12.5   42.5   165    653
                   8 rows, past the caches      2.8   11.1   37.1   142    559
                   16 rows                      3.5   11.5   37.2   139    544
                   32 rows                      4.1   13.7   44.3   160    626

    One tile for all, with norms and gates inside, past the caches / through them (for a state after
    each token the same: 0 to 4 % faster, 9 % for 16 rows of bfloat16):

        float32    8 rows      3.5 / 4.0   20.0 / 20.2   73.6 / 80.0   270 / 271   1062 / 1057
        bfloat16   16 rows     3.0 / 3.6   12.2 / 13.4   41.3 / 43.2   149 / 148    611 / 600

    Args:
        K: Key size.
        V: Value size.
        state_bytes: Bytes of a number of the state.
        heads: States in the call. None: one tile for all, where a state is written for each token,
            the bits of a token are to depend on nothing but its inputs, or code is for every batch.
    """
    width = next_power_of_2(K)
    rows = 4096 // state_bytes // width if state_bytes < 8 else 512 // width
    stream = state_bytes <= 4
    if heads is not None and stream:
        megabytes = heads * V * width * state_bytes / 2**20
        stream = megabytes <= (48 if state_bytes == 4 else 100)
        if stream:
            rows = 8 if state_bytes == 2 and megabytes > 4 else 4
        else:
            rows = 8 if state_bytes == 4 else 16
        rows = rows * 128 // width
    return RecurrentTiles(min(max(1, rows), next_power_of_2(V)), 1, stream)


class VerifyTiles(NamedTuple):
    """Tiles, operands and warps of ``recurrent_verify_kernel``."""

    BT: int  # tokens at a time
    BR: int  # rows of keys and queries
    BK: int
    KB: int  # channels of 64 bytes
    BV: int
    STATE_PARTS: int  # bfloat16 that a number of the state is the sum of
    TOKEN_PARTS: int  # of a key or query
    UPDATE_PARTS: int  # of a token's addition to the state
    EARLY: bool  # all loads of tokens come before the first product
    num_warps: int


# From how many tokens of a row on tensor cores are faster than one token after the other, by bytes
# of a number of the state. us for 2, 4 and 8 tokens of 64 rows on an H200 (2026-11-25), one after
# the other / tensor cores with 16 / 32 rows of the state:
#     float32    76 / 86 / 84     99 / 90 / 94    150 / 117 / 107
#     bfloat16   56 / 56 / 46     80 / 61 / 56    129 / 67 / 73
# 32 rows are right, but their operands leave the registers that loaded the state, and for 4 tokens
# of bfloat16 a thread spills (cross-compiled, tests/test_cross_compile.py).
VERIFY_TOKENS = {2: 4, 4: 4}


def verify_tiles(
    K: int, tokens: int, rows: int | None, state: torch.dtype, token: torch.dtype
) -> VerifyTiles | None:
    """The tiles for a call of ``recurrent_`` with slots ``[N]``, not exact, one decay a head.

    None where ``recurrent_kernel`` is faster.

    Args:
        K: Key size.
        tokens: Tokens of a row, or of all that are packed.
        rows: Packed rows; None: not packed.
        state: Dtype of the states.
        token: Dtype of keys and queries.
    """
    if rows is not None:
        tokens = cdiv(tokens, max(rows, 1))
    if not VERIFY_TOKENS[state.itemsize] <= tokens <= 16:
        return None
    parts = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
    BT = max(4, next_power_of_2(tokens))
    BK = max(16, next_power_of_2(K))
    return VerifyTiles(
        BT=BT,
        BR=max(16, 2 * BT),
        BK=BK,
        KB=min(BK, 64 // state.itemsize),
        BV=16,
        # Between two blocks of tokens the state is float32.
        STATE_PARTS=parts[state] if rows is None else 3,
        TOKEN_PARTS=parts[token],
        UPDATE_PARTS=3 if state == torch.float32 else 2,
        # Loads of tokens before the first product / where they are needed, with norms and gates
        # inside, us on an H200 (2026-11-25). They take registers, and ptxas then loads a state of
        # float32 in pieces; of packed rows, which are a loop, a thread would spill.
        #     float32    4 tokens of 64, 256 rows   127 / 101   470 / 371    8 of 64   107 / 133
        #     bfloat16                               66 / 69    231 / 246               71 / 108
        EARLY=rows is None and (state.itemsize == 2 or BT > 4),
        num_warps=1,
    )
