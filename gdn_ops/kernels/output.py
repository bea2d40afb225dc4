"""The store that a kernel does with its main output."""

import triton
import triton.language as tl


@triton.jit
def store_output(p_o, index, strides, b_o, m_o):
    """Store a tile of a kernel's main output, at the logical ``index`` of its elements.

    Each kernel calls it once. In a template the call becomes the hook through which Inductor fuses
    what follows (lowering/template.py), which is why it takes an index and not an offset.

    Args:
        p_o: The output.
        index: Logical index of each dimension, a tuple; they broadcast to the tile.
        strides: Stride of each dimension, a tuple.
        b_o: The tile, float32; rounded here to the dtype of the output.
        m_o: Mask of the tile.
    """
    o_o = index[0] * strides[0]
    for i in tl.static_range(1, len(index)):
        o_o += index[i] * strides[i]
    tl.store(p_o + o_o, b_o.to(p_o.dtype.element_ty), m_o)
