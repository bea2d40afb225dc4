"""What a peer does not compute itself, compiled by Inductor: gates, norms, and one slot a sequence.

Without it a peer would be timed with a dozen kernels of eager PyTorch before its own.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case

Tokens = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def apply(case: Case, normalise: bool, linear_decay: bool) -> Tokens:
    """``q k v g beta`` of the raw inputs, contiguous; ``g`` linear where the peer wants it so."""
    q, k, v = case.raw
    if normalise:
        q, k = (
            (x.float() * torch.rsqrt((x.float() ** 2).sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
            for x in (q, k)
        )
    step = torch.nn.functional.softplus(case.a.float() + case.dt_bias)
    g = -case.A_log.exp() * step
    tokens = q, k, v, g.exp() if linear_decay else g, case.b.float().sigmoid()
    return tuple(x.contiguous() for x in tokens)  # type: ignore[return-value]


@functools.cache
def compiled() -> Callable[..., Tokens]:
    return torch.compile(apply, fullgraph=True, dynamic=True)


def gated(case: Case, *, normalise: bool, linear_decay: bool = False) -> Tokens:
    """``apply`` as one or two kernels on a GPU, as it is on a CPU."""
    function = compiled() if case.pool.is_cuda else apply
    return function(case, normalise, linear_decay)
