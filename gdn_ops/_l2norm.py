"""The l2 norm of queries and keys, ``x * rsqrt(sum(x * x) + 1e-6)`` over the last dimension."""

from torch import Tensor

_EPS = 1e-6


def inverse_l2norm(x: Tensor) -> Tensor:
    """The factor ``[..., 1]`` that normalises ``x``; the epsilon stands inside the root."""
    return (x * x).sum(-1, keepdim=True).add_(_EPS).rsqrt_()


def l2norm(x: Tensor) -> Tensor:
    """Normalise the last dimension."""
    return x * inverse_l2norm(x)


def l2norm_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of ``l2norm(x)``: ``r * (dy - y * <y, dy>)`` with ``r`` the factor of ``x``."""
    r = inverse_l2norm(x)
    y = x * r
    return r * (dy - y * (y * dy).sum(-1, keepdim=True))
