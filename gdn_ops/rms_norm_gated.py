"""The gated norm of a Gated Delta Net layer's output, in plain torch that a compiler sees through.

    y = x * rsqrt(mean(x * x) + eps) * weight * silu(z)          per head, over V

Source: Hugging Face transformers 5.23, ``Qwen3NextRMSNormGated``; checked bit for bit by
tests/test_gate_and_norm.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import arithmetic_dtype, check_shape


def rms_norm_gated(x: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension, then a gate.

        n = round(x * rsqrt(mean(x * x) + eps))          to the dtype of x
        y = round(weight * n * silu(z))

    The norm and the gate are computed in float32. The product with ``weight`` is rounded to the
    dtype that ``weight`` and ``x`` promote to, as in the model code that this replaces.
    Differentiable in its three tensors.

    Args:
        x: Output of the recurrence, ``[B, T, HV, V]`` (or ``[..., V]``), any floating dtype.
        z: Gate before the silu, shape of ``x``, any floating dtype.
        weight: ``[V]``, any floating dtype.
        eps: Added to the mean square inside the root.

    Returns:
        y: Shape and dtype of ``x``.

    Raises:
        ValueError: ``z`` does not have the shape of ``x``, or ``weight`` is not ``[V]``.

    Source: Hugging Face transformers 5.23; tests/test_gate_and_norm.py.
    """
    check_shape("rms_norm_gated", "z", z, "that of x", tuple(x.shape))
    check_shape("rms_norm_gated", "weight", weight, "[V]", (x.shape[-1],))
    dtype = arithmetic_dtype(x.dtype)
    exact = x.to(dtype)
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    normed = weight * (exact * scale).to(x.dtype)
    return (normed * F.silu(z.to(dtype))).to(x.dtype)
