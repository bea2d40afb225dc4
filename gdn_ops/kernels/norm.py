"""The l2 norm of a query or key inside a kernel."""

import triton
import triton.language as tl


@triton.jit
def inverse_norm(b_x):
    """``rsqrt(sum(x * x) + 1e-6)`` over the last dimension of a tile ``[..., BK]``."""
    return tl.rsqrt(tl.sum(b_x * b_x, -1) + 1e-6)
