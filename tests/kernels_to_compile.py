"""Two tiny kernels for the tests of lowering.sass, which import this file where there is triton."""

import triton  # noqa: TID253
import triton.language as tl  # noqa: TID253


@triton.jit
def scale(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, o < n) * 2, o < n)


@triton.jit
def product(a, b, c, n, K: tl.constexpr):
    """``c [64, 64] = a [64, 64 n] b [64 n, 64]``."""
    o = tl.arange(0, 64)
    acc = tl.zeros([64, 64], tl.float32)
    for i in range(n):
        b_a = tl.load(a + o[:, None] * K + i * 64 + o[None, :])
        b_b = tl.load(b + (i * 64 + o[:, None]) * 64 + o[None, :])
        acc = tl.dot(b_a, b_b, acc)
    tl.store(c + o[:, None] * 64 + o[None, :], acc)
