"""The inverse of a triangular chunk, ``(I + A)^-1``, by products of tensor cores."""

import triton
import triton.language as tl


@triton.jit
def round_operand(b_x):
    """A float32 operand, rounded to bfloat16: that, and the same as float32.

    Rounded as an integer: the conversion and its reverse take a slow unit, one number at a time.
    """
    b_rounded = (b_x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000
    b_rounded = b_rounded.to(tl.float32, bitcast=True)
    return b_rounded.to(tl.bfloat16), b_rounded


@triton.jit
def split_operand(b_x):
    """A float32 operand as a sum of two of bfloat16, which have 16 of its 24 digits."""
    b_high, b_rounded = round_operand(b_x)
    return b_high, (b_x - b_rounded).to(tl.bfloat16)


@triton.jit
def is_lower_block(o_i, o_j, n: tl.constexpr):
    """Whether row and column are in the lower left quarter ``[n, n]`` of a diagonal block."""
    return (o_i // (2 * n) == o_j // (2 * n)) & (o_i // n > o_j // n)


@triton.jit
def merge_blocks(b_X, n, m_low, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Of inverses of diagonal blocks of ``I - N`` those of blocks of twice the size.

    The inverse of ``[[a, 0], [-b, c]]`` has ``c^-1 b a^-1`` below its diagonal, in ``X N X`` where
    ``m_low`` is. The operand in memory is first N, then X, and both can be there before either
    product: of ``X (N X)`` the second would have to wait for the result of the first to be stored.
    """
    x = b_X.to(OPERAND)
    b_Y = tl.where(m_low, tl.dot(x, n, input_precision=PRECISION), 0.0)
    return tl.dot(b_Y.to(OPERAND), x, b_X, input_precision=PRECISION)


@triton.jit
def invert_diagonal(b_N, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """The inverses of the diagonal blocks of 16 of ``I - N``, stacked ``[BT, 16]``.

    With four warps each has its block, and no other needs to wait.
    """
    BT: tl.constexpr = b_N.shape[0]
    o_i = tl.arange(0, BT)
    b_D = tl.where(o_i[:, None] // 16 == o_i[None, :] // 16, b_N, 0.0)
    b_D = tl.sum(tl.reshape(b_D, (BT, BT // 16, 16)), 1)
    b_D = tl.reshape(b_D, (BT // 16, 16, 16))
    o_r = tl.arange(0, 16)[None, :, None]
    o_c = tl.arange(0, 16)[None, None, :]
    b_X = tl.where(o_r == o_c, 1.0, tl.where(o_r // 2 == o_c // 2, b_D, 0.0))
    for i in tl.static_range(1, 4):
        x = b_X.to(OPERAND)
        b_L = tl.where(is_lower_block(o_r, o_c, 2**i), b_D, 0.0)
        b_Y = tl.dot(b_L.to(OPERAND), x, input_precision=PRECISION)
        b_X = tl.dot(x, b_Y.to(OPERAND), b_X, input_precision=PRECISION)
    return tl.reshape(b_X, (BT, 16))


@triton.jit
def invert_chunk(b_A, BT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + A)^-1`` of strictly lower ``[BT, BT]``: blocks of 2, then merges of two.

    Merging is stable. Powers of the whole of A, the other way without a loop, cancel: they reach
    thousands where the keys of a chunk are alike. Merges of bfloat16 leave an error of a percent,
    and a step of Newton, ``X + (I - X (I + A)) X`` with A in two parts, its square: with reflected
    keys that are alike an error of 3e-3, which float16 needs a second step for.
    """
    OPERAND: tl.constexpr = tl.float32 if DOT.is_fp32() else tl.bfloat16
    o_i = tl.arange(0, BT)[:, None]
    o_j = tl.arange(0, BT)[None, :]
    b_N = -b_A
    if DOT.is_fp32():
        n = b_N
    else:
        n, dn = split_operand(b_N)
    b_X = invert_diagonal(b_N, OPERAND, PRECISION)
    if BT > 16:
        # Each block beside itself BT / 16 times, by a product: elsewhere it would move in memory.
        b_E = tl.where(tl.arange(0, 16)[:, None] == o_j % 16, 1.0, 0.0)
        b_X = tl.dot(b_X.to(OPERAND), b_E.to(OPERAND), input_precision=PRECISION)
        b_X = tl.where(o_i // 16 == o_j // 16, b_X, 0.0)
        b_X = merge_blocks(b_X, n, is_lower_block(o_i, o_j, 16), OPERAND, PRECISION)
    if BT == 64:
        b_X = merge_blocks(b_X, n, is_lower_block(o_i, o_j, 32), OPERAND, PRECISION)
    if not DOT.is_fp32():
        for _ in tl.static_range(2 if DOT.is_fp16() else 1):
            x, b_X = round_operand(b_X)
            b_R = tl.dot(x, dn, -b_X)
            b_R = tl.dot(x, n, b_R)
            # I comes last: as the start of the sum it would be 32 registers throughout the loop.
            b_R = tl.where(o_i == o_j, b_R + 1.0, b_R)
            b_X = tl.dot(b_R.to(OPERAND), x, b_X)
    return b_X
