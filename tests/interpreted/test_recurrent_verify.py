"""A few tokens with one write of the state, on tensor cores, in Triton's interpreter.

The float64 loop over tokens is the measure, with the tolerances of the operator that goes token by
token: the products lose nothing that float32 keeps.
"""

import oracle
import pytest
import torch
from inputs import Shape, cu_seqlens, indices, make_inputs, make_state, spread
from tolerance import assert_as_accurate_as_plain, assert_bitwise_equal, witnesses

H, HV, K, V = 1, 2, 20, 18
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def kernels():
    """Imported late: triton must find the environment that conftest.py sets."""
    from gdn_ops.kernels import recurrent

    return recurrent


@pytest.fixture(autouse=True)
def launches(kernels, monkeypatch):
    """The kernel is chosen from two tokens on; a test must have launched it."""
    from gdn_ops.kernels import configs

    count = []
    plain = kernels.recurrent_verify.launch

    def launch(kernel, *args, **constants):
        count.append(kernel)
        return plain(kernel, *args, **constants)

    monkeypatch.setattr(kernels.recurrent_verify, "launch", launch)
    for size in (2, 4):
        monkeypatch.setitem(configs.VERIFY_TOKENS, size, 2)
    yield
    assert count, "the other kernel was launched"


def _inputs(B, T, dtype=BF16, **options):
    return make_inputs(B, T, H, HV, K, V, dtype, **options)


def _assert_updates_like_oracle(kernels, tokens, pool, slots=None, bounds=None, **options):
    """Outputs and the whole pool; what is not written must be the same bits."""
    options = dict(options)
    read = options.pop("read_indices", None)
    args = (*tokens, pool, slots, None, bounds, read)
    exact, plain = witnesses(oracle.delta_rule_into_pool, *args, **options)
    before = pool.clone()
    o = kernels.recurrent_(*args, **options)
    terms = pool.shape[-1]
    assert_as_accurate_as_plain(o, exact[0], plain[0], terms=terms, name="o")
    assert_as_accurate_as_plain(pool, exact[1], plain[1], terms=terms, name="pool")
    untouched = (exact[1] == before.double()).flatten(1).all(1)
    assert_bitwise_equal(pool[untouched], before[untouched], "untouched slots")
    return o


@pytest.mark.parametrize("state_dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_every_dtype_is_as_accurate_as_the_plain_loop(dtype, state_dtype, kernels):
    tokens, pool = _inputs(2, 5, dtype), make_state(4, HV, V, K, state_dtype)
    _assert_updates_like_oracle(kernels, tokens, pool, indices([3, 1]))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(B=1, T=2, H=1, HV=1, K=1, V=1),
        Shape(B=1, T=4, H=1, HV=3, K=64, V=16),
        Shape(B=2, T=8, H=2, HV=2, K=16, V=7),
        Shape(B=1, T=9, H=1, HV=1, K=128, V=24),
        Shape(B=1, T=16, H=1, HV=1, K=256, V=17),
    ],
    ids=str,
)
def test_every_shape_is_as_accurate_as_the_plain_loop(shape, kernels):
    tokens = make_inputs(*shape, BF16)
    _assert_updates_like_oracle(kernels, tokens, make_state(2, shape.HV, shape.V, shape.K))


def _with_decay(value):
    tokens = _inputs(2, 6)
    tokens.g[:, ::2] = value
    return tokens


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (lambda: _inputs(2, 4)._replace(g=None), {}),
        (lambda: _inputs(2, 4)._replace(beta=None), {"scale": 0.7}),
        (lambda: _inputs(2, 5, unit_keys=False), {"use_qk_l2norm": True}),
        (lambda: _inputs(2, 3, FP32, unit_keys=False), {"use_qk_l2norm": True, "scale": 1.0}),
        (lambda: _inputs(2, 4, negative_eigenvalues=True, beta_dtype=BF16), {}),
        (lambda: _with_decay(-100.0), {}),
        (lambda: _with_decay(-torch.inf), {}),
        (lambda: _inputs(2, 4), {"read_indices": indices([2, 0], torch.int64)}),
    ],
    ids=["no-g", "no-beta", "l2norm", "l2norm-fp32", "beta-2", "g-100", "g-inf", "read"],
)
def test_every_option_means_what_the_oracle_says(tokens, options, kernels):
    pool, slots = make_state(4, HV, V, K), indices([3, 1], torch.int64)
    _assert_updates_like_oracle(kernels, tokens(), pool, slots, **options)


@pytest.mark.parametrize(("null_index", "slots"), [(-1, [-1, 2, -7]), (0, [0, 3, -1])])
def test_padding_rows_are_zero_and_touch_no_state(slots, null_index, kernels):
    """Their tokens are NaN, and so are the slots of nobody."""
    tokens, pool = _inputs(3, 4), make_state(4, HV, V, K)
    for x in tokens:
        x[[0, 2]] = torch.nan
    pool[1] = torch.nan
    expected = pool.clone()
    row = tokens.rows(slice(1, 2))
    alone = kernels.recurrent_(*row, expected, indices(slots[1:2]))
    o = kernels.recurrent_(*tokens, pool, indices(slots), null_index=null_index)
    assert_bitwise_equal(o[[0, 2]], torch.zeros_like(o[[0, 2]]), "o of padding")
    assert_bitwise_equal(o[1:2], alone, "o")
    assert_bitwise_equal(pool, expected, "pool")


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
def test_packed_rows_of_any_length_update_their_slots_alone(state_dtype, kernels):
    """Empty rows, rows longer than a block of tokens, and tokens of no row, which are NaN."""
    lengths = (3, 0, 11, 1, 4)
    tokens = _inputs(1, sum(lengths) + 6)
    pool, bounds = make_state(7, HV, V, K, state_dtype), cu_seqlens(lengths)
    slots = indices([6, 2, 0, -1, 3])
    args = (pool.clone(), slots, None, bounds)
    exact, plain = witnesses(oracle.delta_rule_into_pool, *tokens, *args)
    for x in tokens:
        x[:, sum(lengths) :] = torch.nan
        x[:, 14:15] = torch.nan
    o = kernels.recurrent_(*tokens, pool, *args[1:])
    assert_as_accurate_as_plain(o, exact[0], plain[0], terms=K, name="o")
    assert_as_accurate_as_plain(pool, exact[1], plain[1], terms=K, name="pool")
    assert_bitwise_equal(pool[[1, 2, 4, 5]], args[0][[1, 2, 4, 5]], "untouched slots")


def test_a_query_reaches_no_state(kernels):
    tokens, pool = _inputs(1, 4), make_state(1, HV, V, K)
    expected = pool.clone()
    kernels.recurrent_(*tokens, expected)
    tokens.q[:, 1] = torch.nan
    o = kernels.recurrent_(*tokens, pool)
    assert_bitwise_equal(pool, expected, "pool")
    assert o[:, [0, 2, 3]].isfinite().all()


def test_slots_and_heads_may_lie_anywhere(kernels):
    """Tokens that are slices of a projection, slots that are a column, pages with gaps."""
    tokens, values = _inputs(2, 4), make_state(3, HV, V, K)
    slots = indices([2, 0])
    dense = values.clone()
    expected = kernels.recurrent_(*tokens, dense, slots)
    pool, buffer = spread(values, 12, 5)
    is_gap = torch.ones_like(buffer, dtype=torch.bool)
    is_gap.as_strided(pool.shape, pool.stride(), pool.storage_offset()).fill_(False)
    odd = tokens.map(lambda x: torch.stack([x, x], -1)[..., 0])
    o = kernels.recurrent_(*odd, pool, torch.stack([slots, slots], 1)[:, 0])
    assert_bitwise_equal(o, expected, "o")
    assert_bitwise_equal(pool, dense, "pool")
    assert (buffer[is_gap] == -7777.0).all()


def test_the_choice_between_the_kernels_reads_no_data(kernels, monkeypatch):
    """Tables, exact calls, decays per channel, one token and many go token by token."""
    _assert_updates_like_oracle(kernels, _inputs(1, 2), make_state(1, HV, V, K))

    def refuse(*_, **__):
        raise AssertionError("the kernel for a few tokens was launched")

    monkeypatch.setattr(kernels.recurrent_verify, "launch", refuse)
    pool = make_state(4, HV, V, K)
    kernels.recurrent_(*_inputs(1, 1), pool)
    kernels.recurrent_(*_inputs(1, 17), pool)
    kernels.recurrent_(*_inputs(1, 4), pool, exact=True)
    kernels.recurrent_(*_inputs(1, 4, kda=True), pool)
    kernels.recurrent_(*_inputs(1, 4), pool, indices([[0, 1, 2, 3]]))
    kernels.recurrent_(*_inputs(1, 2), pool, None, None, cu_seqlens([1, 1]))
