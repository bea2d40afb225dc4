"""Tolerances that are derived, not chosen.

The plain operator is the oracle's own token loop in float32, on the same inputs, rounded once to
the dtype of the result; where matrix products of 16-bit inputs are computed, with the operands of
its products in that dtype. An operator may be off by at most twice the largest error of the plain
operator, plus what no arithmetic can avoid:

- half a unit in the last place of the result, because two results that differ by nothing worth
  mentioning may round to different neighbours, and the plain one may have had the luck;
- ``sqrt(K) eps`` of the largest value, which is how far two sums of the same ``K`` products in a
  different order typically lie apart (Higham and Mary 2019): the plain error may be smaller by luck
  in a tensor of few elements.

For float64 the error of the plain float32 operator is scaled by the ratio of the two precisions.
"""

import torch

ARITHMETIC = torch.float32


def witnesses(function, *args, operands=None, **kwargs):
    """The exact results of an oracle's function, and those of the plain float32 operator.

    Args:
        function: A function of ``oracle.py``.
        args: Its arguments.
        operands: The dtype that the plain operator's products take their operands in, where the
            operator under test computes with matrix products: see ``operands_of``.
        kwargs: Its options.
    """
    exact = function(*args, **kwargs, dtype=torch.float64)
    if operands is not None:
        kwargs["operands"] = operands
    plain = function(*args, **kwargs, dtype=ARITHMETIC)
    return exact, plain


def operands_of(operator, dtype):
    """The dtype in which matrix products of ``operator`` may take their operands; None: exact.

    ``chunk`` and the gradients multiply matrices, which in 16 bit have operands of 16 bit and sums
    in float32, as tensor cores compute. ``recurrent`` has no need of them.
    """
    is_chunked = operator.__name__ in ("chunk", "chunk_")
    return dtype if is_chunked and dtype.itemsize == 2 else None


def bound(exact, plain, dtype, terms):
    """The largest error that is allowed for every element.

    Args:
        exact: The float64 result.
        plain: The float32 result of the plain operator.
        dtype: The dtype of the result under test.
        terms: The length of the sums behind an element.
    """
    exact, plain = exact.detach(), plain.detach()
    precision = torch.finfo(ARITHMETIC).eps
    if dtype == torch.float64:
        scale = torch.finfo(torch.float64).eps / precision
        largest = (plain.double() - exact).abs().amax() * scale
        precision = torch.finfo(torch.float64).eps
    else:
        largest = (plain.to(dtype).double() - exact).abs().amax()
    half_unit = 0.5 * torch.finfo(dtype).eps * exact.abs()
    return 2 * largest + half_unit + terms**0.5 * precision * exact.abs().amax()


def assert_as_accurate_as_plain(actual, exact, plain, *, terms, name="result"):
    """Fail where ``actual`` is further from ``exact`` than ``bound`` allows."""
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    if actual.numel() == 0:
        return
    error = (actual.detach().cpu().double() - exact.detach()).abs()
    excess = error - bound(exact, plain, actual.dtype, terms)
    # Written so that a NaN is a failure.
    if not bool((excess <= 0).all()):
        worst = int(torch.nan_to_num(excess, nan=torch.inf).argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{name}{list(where)} is {actual[where].item():.9g}, exactly {exact[where].item():.9g}:"
            f" off by {error[where].item():.3g}, allowed"
            f" {(error - excess)[where].item():.3g}; {int((~(excess <= 0)).sum())} of"
            f" {error.numel()} elements are off"
        )


def assert_all_as_accurate_as_plain(actual, exact, plain, *, terms, names=("o", "state")):
    """The same for the results of one call, given as equally long tuples."""
    assert len(actual) == len(exact) == len(plain) == len(names)
    for values in zip(actual, exact, plain, names, strict=True):
        assert_as_accurate_as_plain(*values[:3], terms=terms, name=values[3])


def assert_all_equal_up_to_rounding(actual, expected, exact, plain, *, terms, names=("o", "state")):
    """Two ways to the same results differ by no more than each of them may be off."""
    for x, y, true, rough, name in zip(actual, expected, exact, plain, names, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        difference = (x.detach().cpu().double() - y.detach().cpu().double()).abs()
        assert (difference <= 2 * bound(true, rough, x.dtype, terms)).all(), name


def assert_bitwise_equal(actual, expected, name="result"):
    """Equal bit for bit; a NaN equals the same NaN, and -0.0 does not equal 0.0."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} against {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} against {expected.dtype}"
    size = actual.dtype.itemsize
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    different = actual.contiguous().view(integer) != expected.contiguous().view(integer)
    count = int(different.sum())
    assert count == 0, f"{name}: {count} of {different.numel()} elements differ"
