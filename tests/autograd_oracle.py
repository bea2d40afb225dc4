"""Gradients as float64 autograd through the oracle's loops computes them."""

import oracle
import torch
from inputs import generator
from tolerance import assert_as_accurate_as_plain


def upstream_of(results, seed=3):
    """Gradients of the results, numbers that every dtype represents exactly."""
    source = generator(seed)
    numbers = [torch.randint(-16, 17, x.shape, generator=source) / 8 for x in results]
    return [n.to(x.device, x.dtype) for n, x in zip(numbers, results, strict=True)]


def gradients_of(function, tensors, *args, **options):
    """The gradients of every tensor of ``tensors`` that is not None."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    results = function(*leaves, *args, **options)
    wanted = [x for x in leaves if x is not None]
    # A loop over no token returns zeros that depend on nothing.
    pairs = [x for x in zip(results, upstream_of(results), strict=True) if x[0].requires_grad]
    outputs, upstream = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, upstream, materialize_grads=True))
    return [None if x is None else next(found) for x in leaves]


def _oracle_gradients(function, tensors, *args, dtype, **options):
    cast = [None if x is None else x.cpu().to(dtype) for x in tensors]
    return gradients_of(function, cast, *args, dtype=dtype, **options)


def gradients_by_loop(loop, tensors, *args, **options):
    """The exact gradients, and those of float32 autograd through the plain loop."""
    exact = _oracle_gradients(loop, tensors, *args, dtype=torch.float64, **options)
    # Both forms of the delta rule have the gradient of the chunked one.
    operands = {}
    if loop is oracle.delta_rule and tensors[0].dtype.itemsize == 2:
        operands = {"operands": tensors[0].dtype}
    plain = _oracle_gradients(loop, tensors, *args, dtype=torch.float32, **options, **operands)
    return exact, plain


def assert_equals_autograd(operator, loop, names, tensors, *args, terms, **options):
    """Every gradient is as accurate as float32 autograd through the plain loop."""
    exact, plain = gradients_by_loop(loop, tensors, *args, **options)
    actual = gradients_of(operator, tensors, *args, **options)
    assert_gradients(actual, exact, plain, names, tensors, terms=terms)


def assert_gradients(actual, exact, plain, names, tensors, *, terms):
    """Each has the shape and dtype of its tensor, and is as accurate as the plain one."""
    for name, x, gradient, true, rough in zip(names, tensors, actual, exact, plain, strict=True):
        if x is None:
            assert gradient is None
        else:
            assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype), f"d{name}"
            assert_as_accurate_as_plain(gradient, true, rough, terms=terms, name=f"d{name}")
