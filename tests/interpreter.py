"""Triton's interpreter, with bfloat16 as the hardware has it.

The interpreter of Triton 3.6 to 3.7.1 truncates where float32 becomes bfloat16, and multiplies the
bit patterns of bfloat16 operands in ``tl.dot``. A kernel is right or wrong for other reasons than
these, so they are mended here, for the tests only.
"""

import numpy as np


def _to_bfloat16(values):
    """Round to nearest, ties to even; bfloat16 is kept as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _to_float32(bits):
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def repair():
    """Mend the interpreter of this process; it must be on (``TRITON_INTERPRET=1``)."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    # As on the hardware: an overflow is an infinity, and what a mask hides computes all the same.
    np.seterr(all="ignore")
    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self, src, dst_type):
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bfloat16(src.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(_to_float32(src.data), tl.float32)
        return plain_cast(self, src, dst_type)

    def dot(self, a, b, d, *options):
        a, b = (
            TensorHandle(_to_float32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return plain_dot(self, a, b, d, *options)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_dot = dot
    # Bound when the class was made.
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, cast)
