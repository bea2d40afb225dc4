"""The l2 norm of a query or key inside a kernel."""

import triton
import triton.language as tl


@triton.jit
def squares(b_x):
    """``sum(x * x)`` over the last dimension of a tile ``[..., BK]``."""
    return tl.sum(b_x * b_x, -1)


@triton.jit
def inverse_root(b_squares):
    """``rsqrt(squares + 1e-6)``, the inverse norm of what has these sums of squares."""
    return tl.rsqrt(b_squares + 1e-6)


@triton.jit
def inverse_norm(b_x):
    """``rsqrt(sum(x * x) + 1e-6)`` over the last dimension of a tile ``[..., BK]``."""
    return inverse_root(squares(b_x))
