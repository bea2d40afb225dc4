"""The decay gate of a Gated Delta Net layer, in plain torch that a compiler sees through.

    g = -exp(A_log) * softplus(a + dt_bias)          softplus(x) = x where x > 20

Source: Hugging Face transformers 5.23, ``Qwen3NextGatedDeltaNet.forward``; checked bit for bit by
tests/test_gate_and_norm.py.
"""

import torch.nn.functional as F
from torch import Tensor

from ._checks import arithmetic_dtype, check_shape


def gdn_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Log decay of each token and value head from its raw projection.

        g = -exp(A_log) * softplus(a + dt_bias)

    Differentiable in its three tensors; the arithmetic is float32.

    Args:
        a: Raw projection, ``[B, T, HV]`` (or ``[..., HV]``), any floating dtype.
        A_log: Logarithm of the decay rate, ``[HV]``, any floating dtype.
        dt_bias: Bias of the projection, ``[HV]``, any floating dtype.

    Returns:
        g: Natural logarithm, ``<= 0``, shape of ``a``, float32 (float64 where ``a`` is float64).

    Raises:
        ValueError: ``A_log`` or ``dt_bias`` does not have shape ``[HV]``.

    Source: Hugging Face transformers 5.23; tests/test_gate_and_norm.py.
    """
    check_shape("gdn_gate", "A_log", A_log, "[HV]", (a.shape[-1],))
    check_shape("gdn_gate", "dt_bias", dt_bias, "[HV]", (a.shape[-1],))
    dtype = arithmetic_dtype(a.dtype)
    return -A_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype))
