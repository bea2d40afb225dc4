"""The launching functions of chunk against the float64 loop over tokens."""

import oracle
import torch
from tolerance import (
    assert_all_as_accurate_as_plain,
    assert_as_accurate_as_plain,
    assert_bitwise_equal,
)


def witnesses(function, dtype, *args, **options):
    """The plain operator is the oracle's loop in ``dtype``, that of the products."""
    exact = function(*args, **options)
    plain = function(*args, **options, dtype=dtype)
    return exact, tuple(x.float() for x in plain)


def assert_equals_oracle(kernels, call):
    args, options = call
    assert kernels.supports(*args, **options) is None
    exact, plain = witnesses(oracle.delta_rule, args[0].dtype, *args, **options)
    actual = kernels.chunk(*args, **options)
    assert actual[0].dtype == args[0].dtype
    assert all(x.is_contiguous() for x in actual)
    assert_all_as_accurate_as_plain(actual, exact, plain, terms=args[0].shape[-1])


def assert_updates_like_oracle(kernels, tokens, pool, slots, dtype=torch.float32, **options):
    """Outputs and the whole pool: what is not written must be the same bits."""
    exact, plain = witnesses(oracle.delta_rule_into_pool, dtype, *tokens, pool, slots, **options)
    before = pool.clone()
    o = kernels.chunk_(
        *tokens,
        pool,
        slots,
        options.pop("has_initial_state", None),
        options.pop("cu_seqlens", None),
        options.pop("read_indices", None),
        **options,
    )
    assert_as_accurate_as_plain(o, exact[0], plain[0], terms=tokens.q.shape[-1], name="o")
    assert_as_accurate_as_plain(pool, exact[1], plain[1], terms=tokens.q.shape[-1], name="pool")
    untouched = (exact[1] == before.double()).flatten(1).all(1)
    assert_bitwise_equal(pool[untouched], before[untouched], "untouched slots")
    return o, untouched
