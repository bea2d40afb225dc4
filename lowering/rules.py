"""Which rule lowers which operator, and what happens where a rule cannot."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

import gdn_ops  # noqa: F401 it registers the operators

from . import (
    _inductor,
    cache_key,
    causal_conv1d,
    causal_conv1d_backward,
    chunk,
    chunk_backward,
    cpu,
    recurrent,
)

log = logging.getLogger(__name__)

RULES: dict[str, Callable[..., Any]] = {
    "causal_conv1d": causal_conv1d.lower,
    "causal_conv1d_": causal_conv1d.lower_,
    "causal_conv1d_backward": causal_conv1d_backward.lower,
    "chunk": chunk.lower,
    "chunk_": chunk.lower_,
    "chunk_backward": chunk_backward.lower,
    "recurrent_backward": chunk_backward.lower,
    "recurrent": recurrent.lower,
    "recurrent_": recurrent.lower_,
}

# For tensors on a CPU, in place of those above.
CPU_RULES: dict[str, Callable[..., Any]] = {
    "causal_conv1d_": cpu.lower_causal_conv1d_,
    "recurrent": cpu.lower_recurrent,
    "recurrent_": cpu.lower_recurrent_,
}

_registered: set[str] = set()
_was_unregistered = False


def register_at_first_trace() -> None:
    """What the lazy switch of ``gdn_ops`` calls; it does not undo an ``unregister``."""
    if not _was_unregistered:
        register()


def register() -> None:
    global _was_unregistered
    _was_unregistered = False
    for name, rule in RULES.items():
        if name not in _registered:
            operator = getattr(torch.ops.gdn, name).default
            _inductor.add_lowering(operator, _or_eager(operator, _by_device(name, rule)))
            _registered.add(name)
    cache_key.add()


def unregister() -> None:
    global _was_unregistered
    _was_unregistered = True
    for name in list(_registered):
        _inductor.remove_lowering(getattr(torch.ops.gdn, name).default)
        _registered.discard(name)
    cache_key.remove()


def _by_device(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    """``rule``, or the one for a CPU where the tensors are there; all are on one device."""

    @functools.wraps(rule)
    def lower(*args: Any, **keywords: Any) -> Any:
        nodes = (x for x in (*args, *keywords.values()) if isinstance(x, _inductor.IRNode))
        on_cpu = _inductor.device(next(nodes)).type == "cpu"
        return (CPU_RULES.get(name, rule) if on_cpu else rule)(*args, **keywords)

    return lower


def _or_eager(operator: torch._ops.OpOverload, rule: Callable[..., Any]) -> Callable[..., Any]:
    """``rule``, or the opaque call where it fails: no compile breaks for want of a template."""
    name = operator.name()

    @functools.wraps(rule)
    def lower(*args: Any, **keywords: Any) -> Any:
        try:
            return rule(*args, **keywords)
        except _inductor.Unsupported as reason:
            _say_once(f"{name} stays an opaque call: {reason}")
        except Exception as error:
            told = str(error).partition("\n")[0]
            _say_once(f"{name} stays an opaque call: {type(error).__name__}: {told}")
            log.debug("the lowering of %s failed", name, exc_info=True)
        return _inductor.eager_call(operator, *args, **keywords)

    return lower


@functools.cache
def _say_once(message: str) -> None:
    log.info(message)
