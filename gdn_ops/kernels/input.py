"""The loads of a kernel that a template may replace by what computes the number."""

import triton
import triton.language as tl


@triton.jit
def load_input(p_x, index, strides, m_x):
    """Load the number at the logical ``index`` of an input, as float32; 0 where masked.

    A kernel calls it as ``b_x = load_input(x, index, ...)``. Where an input of a template is not in
    memory yet, the call becomes what computes it (lowering/template.py).

    Args:
        p_x: The input.
        index: Logical index of each dimension, a tuple.
        strides: Stride of each dimension, a tuple.
        m_x: Mask.
    """
    o_x = index[0] * strides[0]
    for i in tl.static_range(1, len(index)):
        o_x += index[i] * strides[i]
    return tl.load(p_x + o_x, m_x, 0.0).to(tl.float32)
