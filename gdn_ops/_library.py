"""Registration of the operators under ``torch.ops.gdn``.

``Library.define`` and ``impl`` cost about 3.5 us a call, ``torch.library.custom_op`` 6 to 11 us and
with a mutated argument 37 us (torch 2.13, CPU), which is why the operators are registered by hand.
"""

from collections.abc import Callable
from typing import Any

import torch

# FRAGMENT: another extension may add operators to the namespace. The object must outlive the
# registration.
_LIBRARY = torch.library.Library("gdn", "FRAGMENT")

# - flexible_layout: every implementation accepts any strides, so the compiler need not freeze them.
# - cudagraph_unsafe: the implementation in plain PyTorch reads cu_seqlens and slot indices on the
# host.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    torch.Tag.flexible_layout,
    torch.Tag.cudagraph_unsafe,
)


def register_operator(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Define ``torch.ops.gdn.<name>`` from its schema, its eager implementation and its fake.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"``.
        reference: The eager implementation, for every device.
        fake: Shapes, dtypes and strides of the outputs; must not read data.
    """
    _LIBRARY.define(schema, tags=_TAGS)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gdn::{name}", fake, lib=_LIBRARY)


def register_gradient(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    """Make ``torch.ops.gdn.<name>`` differentiable."""
    torch.library.register_autograd(
        f"gdn::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def refuse_gradient(op: str, use: str, *tensors: torch.Tensor | None) -> None:
    """Raise where an operator that has no gradient would silently cut one.

    Raises:
        NotImplementedError: grad mode is on and one of ``tensors`` requires a gradient.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            f"{op}: an operator that updates its state in place has no gradient; "
            f"use gdn_ops.{use}, or call it under torch.no_grad()"
        )
