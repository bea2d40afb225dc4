"""Registration of the operators under ``torch.ops.gdn``.

``Library.define`` and ``impl`` cost about 3.5 us a call, ``torch.library.custom_op`` 6 to 11 us and
with a mutated argument 37 us (torch 2.13, CPU), which is why the operators are registered by hand.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from ._plans import Plans

_log = logging.getLogger(__name__)

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
    kernels: str | None = None,
    check_data: Callable[..., None] | None = None,
    function: str | None = None,
    cpu: str | None = None,
) -> None:
    """Define ``torch.ops.gdn.<name>`` from its schema, its eager implementation and its fake.

    Args:
        schema: ``"name(Tensor x, ...) -> Tensor"``.
        reference: The implementation in plain PyTorch, for every device.
        fake: Shapes, dtypes and strides of the outputs; must not read data.
        kernels: The module of ``gdn_ops.kernels`` that launches it on CUDA. Default: none.
        check_data: Called with the arguments before a launch: the checks of ``GDN_DEBUG=1``.
        function: Name of the launching function. Default: that of the operator.
        cpu: The module of ``gdn_ops.cpu`` that calls it in C on a CPU. Default: none.
    """
    _LIBRARY.define(schema, tags=_TAGS)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gdn::{name}", switch_on_lowering(fake), lib=_LIBRARY)
    if kernels is not None:
        on_gpu = _with_kernels(name, reference, fake, kernels, check_data, function or name)
        _LIBRARY.impl(name, on_gpu, "CUDA")
        KERNELS[name] = on_gpu
    if cpu is not None:
        _LIBRARY.impl(name, _in_c(name, reference, fake, cpu, check_data), "CPU")


# Implementations for CUDA by operator name; the tests run them in Triton's interpreter.
KERNELS: dict[str, Callable[..., Any]] = {}


def _with_kernels(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    module: str,
    check_data: Callable[..., None] | None,
    function: str,
) -> Callable[..., Any]:
    """The operator on its kernels, or in plain PyTorch where they cannot serve a call."""

    plans = Plans()

    def on_gpu(*args: Any, **keywords: Any) -> Any:
        match, plan = plans.recent
        found = match(args, keywords)
        if found is None:
            plan, found = plans.find(args, keywords)
        if plan is None:
            # A shortcut may have come here above autograd (past_autograd).
            with torch._C._AutoDispatchBelowAutograd():
                result, plan = first(args, keywords)
            if plan is not None:
                plans.add(args, keywords, plan)
            return result
        if check_data is not None and debug():
            check_data(*args, **keywords)
        return plan(*found)

    def first(args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        """The result, and the plan for the calls that follow."""
        kernels = _load(module)
        reason = "triton is not installed" if kernels is None else kernels.supports(*args)
        if not _is_served(name, reason):
            return reference(*args, **keywords), None
        fake(*args, **keywords)  # raises what the operator raises; its outputs are dropped
        if check_data is not None and debug():
            check_data(*args, **keywords)
        call = functools.partial(getattr(_load(module), function), *args, **keywords)
        with _current_device(args[0].device):
            recorded: tuple[Any, Any] = _load("record").record(call, args)
        return recorded

    return on_gpu


def _in_c(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    module: str,
    check_data: Callable[..., None] | None,
) -> Callable[..., Any]:
    """The operator in C, or in plain PyTorch where that cannot serve a call."""

    plans = Plans()

    def on_cpu(*args: Any, **keywords: Any) -> Any:
        if _is_set(_PLAIN):
            return reference(*args, **keywords)
        match, plan = plans.recent
        found = match(args, keywords)
        if found is None:
            plan, found = plans.find(args, keywords)
        if plan is None:
            kernels = importlib.import_module(f"{__package__}.cpu.{module}")
            if not _is_served(name, kernels.supports(name, args, keywords)):
                return reference(*args, **keywords)
            fake(*args, **keywords)  # raises what the operator raises; its outputs are dropped
            plans.add(args, keywords, kernels.Plan(name, args, keywords))
            plan, found = plans.find(args, keywords)
        if check_data is not None and debug():
            check_data(*args, **keywords)
        result = plan(*found)
        # A slot outside the pool: the reference says which.
        return reference(*args, **keywords) if result is None else result

    return on_cpu


def _is_served(name: str, reason: str | None) -> bool:
    """Whether there is no reason against it; one is said, once."""
    if reason is not None:
        _say_once(f"{name}: runs in plain PyTorch: {reason}")
    return reason is None


def _current_device(device: torch.device) -> Any:
    """A context in which kernels are launched on ``device``."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.cache
def _load(module: str) -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"{__package__}.kernels.{module}")


@functools.cache
def _say_once(message: str) -> None:
    _log.info(message)


# os.environ.get takes 0.7 us to say that a variable is not set, the dictionary beneath 0.1: a
# launch from Python should not take 10.
_ENVIRONMENT: Any = getattr(os.environ, "_data", None)
_DEBUG, _PLAIN = "GDN_DEBUG", "GDN_PLAIN_CPU"
_KEYS, _ON = {x: os.environ.encodekey(x) for x in (_DEBUG, _PLAIN)}, os.environ.encodevalue("1")


def _is_set(name: str) -> bool:
    """Whether an environment variable of ``_KEYS`` is 1."""
    if _ENVIRONMENT is None:
        return os.environ.get(name) == "1"
    return bool(_ENVIRONMENT.get(_KEYS[name]) == _ON)


def debug() -> bool:
    """Whether ``GDN_DEBUG=1`` asks for the checks that read data."""
    return _is_set(_DEBUG)


def switch_on_lowering(fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake``, which registers the lowerings when the first compile traces it.

    Importing Inductor takes most of a second; so it waits for one who needs it.
    """

    @functools.wraps(fake)
    def traced(*args: Any, **keywords: Any) -> Any:
        if torch._guards.TracingContext.try_get() is not None:
            _register_lowerings()
        return fake(*args, **keywords)

    return traced


@functools.cache
def _register_lowerings() -> None:
    from torch.utils._python_dispatch import _disable_current_modes

    try:
        with _disable_current_modes():
            importlib.import_module("lowering.rules").register_at_first_trace()
    except Exception as error:  # a compile must not fail for want of speed
        _log.info("no lowerings, operators stay opaque: %s: %s", type(error).__name__, error)


def register_gradient(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    """Make ``torch.ops.gdn.<name>`` differentiable."""
    torch.library.register_autograd(
        f"gdn::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )
    if name in KERNELS:
        shortcut = past_autograd(f"gdn::{name}", KERNELS[name], "CUDA")
        _LIBRARY.impl(name, shortcut, "AutogradCUDA", with_keyset=True)


def past_autograd(name: str, kernel: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """``kernel`` where no gradient is asked for, else what ``register_autograd`` registered.

    That makes a context and calls the dispatcher again, 4 us where nothing requires a gradient
    (torch 2.13, CPU). Where anything but the backend waits below autograd, as a fake tensor, a
    dispatch mode or a transform of torch.func, the dispatcher goes on.

    Args:
        name: Of the operator, with its namespace.
        kernel: Its implementation for the backend.
        backend: ``"CUDA"``.
    """
    differentiable = torch.library.get_kernel(name, f"Autograd{backend}")
    below = torch._C._after_autograd_keyset.raw_repr()
    alone = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, backend)).raw_repr()
    is_grad_enabled, any_requires_grad = torch.is_grad_enabled, torch._C._any_requires_grad

    def at_autograd(keyset: Any, *args: Any, **keywords: Any) -> Any:
        is_asked = is_grad_enabled() and any_requires_grad(*args)
        if is_asked or keyset.raw_repr() & below != alone:
            return differentiable.call_boxed(keyset, *args, **keywords)
        return kernel(*args, **keywords)

    return at_autograd


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
