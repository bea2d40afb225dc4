"""The arithmetic of ``exact=True``: what a token's result is made of, bit by bit.

A compiler may contract a product and a sum into one rounding, in one kernel and not in another, and
the order of a reduction follows from the layout that it chose. Here neither is left to it: a
product is a fused multiply-add of its own, which cannot be contracted further, and a sum is a tree
of sums of two, which are the same in either order.
"""

import triton
import triton.language as tl


@triton.jit
def exact_product(b_x, b_y):
    """``x * y``, rounded; zero is +0. Adding -0 instead would let a compiler see a product."""
    return tl.fma(b_x, b_y, 0.0)


@triton.jit
def tree_sum(b_x, BR: tl.constexpr, BK: tl.constexpr):
    """Sum of ``[BR, BK]`` over its last dimension: of neighbours, of neighbouring sums, and on."""
    # One reshape: of one before each sum Triton 3.9 makes a layout in which every lane has all.
    shape: tl.constexpr = [BR] + [2] * (BK.bit_length() - 1)
    b_x = tl.reshape(b_x, shape)
    for _ in tl.static_range(BK.bit_length() - 1):
        b_x = tl.sum(b_x, -1)
    return b_x


@triton.jit
def exact_inverse_norm(b_x, BK: tl.constexpr):
    """``rsqrt(sum(x * x) + 1e-6)`` of a row ``[BK]``, as ``[1]``."""
    return tl.rsqrt(tree_sum(exact_product(b_x, b_x), 1, BK) + 1e-6)


@triton.jit
def exact_delta_step(b_s, b_q, b_k, b_v, b_g, b_beta, BV: tl.constexpr, BK: tl.constexpr):
    """``delta_step``, with a defined order of all roundings."""
    b_s *= tl.exp(b_g)
    b_u = b_beta * (b_v - tree_sum(exact_product(b_s, b_k[None, :]), BV, BK))
    b_s = tl.fma(b_u[:, None], b_k[None, :], b_s)
    return b_s, tree_sum(exact_product(b_s, b_q[None, :]), BV, BK)
