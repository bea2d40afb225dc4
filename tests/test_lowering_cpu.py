"""One token on a CPU is inlined where a rule serves it: as exact as the operator, and in place."""

import re

import oracle
import pytest
import torch
from inputs import cu_seqlens, indices, make_convolution, make_inputs, make_state, spread
from tolerance import assert_as_accurate_as_plain, assert_bitwise_equal, witnesses
from torch.nn.functional import silu

import gdn_ops
from lowering import cpu, rules

H, HV, K, V, D, W = 2, 4, 20, 24, 12, 4
SLOTS = 5


@pytest.fixture(autouse=True)
def empty_compile_cache():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compile(function, *args, **options):
    """Results of a compiled call, and the code that Inductor wrote."""
    from torch._inductor.utils import run_and_get_code  # noqa: TID251

    compiled = torch.compile(function, fullgraph=True)
    with torch.no_grad():
        results, (code,) = run_and_get_code(compiled, *args, **options)
    return results, code


def _is_inlined(code):
    return "torch.ops.gdn" not in code


def _assert_allocates_no(pool, code):
    sizes = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\)", code)
    for size in sizes:
        assert torch.Size(int(x) for x in size.split(",") if x.strip()).numel() < pool.numel()


def _part_of_projection(x):
    return torch.cat([x.new_full(x.shape, torch.nan), x], -1)[..., x.shape[-1] :]


TOKENS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16, "beta_dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "decay-per-channel": {"kda": True},
    "negative-eigenvalues": {"negative_eigenvalues": True},
}


def _assert_updates_like_oracle(tokens, pool, **options):
    exact, plain = witnesses(oracle.delta_rule_into_pool, *tokens, pool, **options)
    before = pool.clone()
    o, code = _compile(gdn_ops.recurrent_, *tokens, pool, **options)
    assert _is_inlined(code)
    assert o.is_contiguous()
    assert_as_accurate_as_plain(o, exact[0], plain[0], terms=K, name="o")
    assert_as_accurate_as_plain(pool, exact[1], plain[1], terms=K, name="pool")
    B = tokens.q.shape[0]
    assert_bitwise_equal(pool[B:], before[B:], "slots of no row")
    return code


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("B", "l2norm"), [(1, False), (3, True)], ids=["one", "three-l2norm"])
def test_an_inlined_step_is_as_exact_as_the_operator(B, l2norm, tokens):
    inputs = make_inputs(B, 1, H, HV, K, V, unit_keys=not l2norm, **TOKENS[tokens])
    state = torch.float64 if tokens == "float64" else torch.float32
    _assert_updates_like_oracle(inputs, make_state(SLOTS, HV, V, K, state), use_qk_l2norm=l2norm)


@pytest.mark.parametrize(
    "absent", [{"g": None}, {"beta": None}, {"g": None, "beta": None}], ids=str
)
def test_what_is_absent_is_no_decay_and_ones(absent):
    tokens = make_inputs(3, 1, H, HV, K, V)._replace(**absent)
    _assert_updates_like_oracle(tokens, make_state(SLOTS, HV, V, K), scale=0.7)


@pytest.mark.parametrize(
    ("dtype", "state"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_a_state_is_rounded_once_when_it_is_stored(dtype, state):
    tokens = make_inputs(3, 1, H, HV, K, V, dtype)
    _assert_updates_like_oracle(tokens, make_state(SLOTS, HV, V, K, state))


def test_a_row_of_a_state_is_written_before_the_next_is_read():
    """Both sums and the write share their loops over rows: memory is read once and written once."""
    tokens, pool = make_inputs(3, 1, H, HV, K, V), make_state(SLOTS, HV, V, K)
    code = _assert_updates_like_oracle(tokens, pool, use_qk_l2norm=True)
    nests = re.split(r"\n {4}\{\n", code)
    over_states = [nest for nest in nests if "int64_t x3" in nest]  # [B H, R, V, K]
    assert len(over_states) == 1
    assert over_states[0].count("for(int64_t x2") == 1


def test_a_pool_with_gaps_is_written_nowhere_else():
    pool, buffer = spread(make_state(SLOTS, HV, V, K), slot_gap=7, head_gap=3, offset=5)
    gaps = torch.full_like(buffer, True, dtype=torch.bool)
    gaps.as_strided(pool.shape, pool.stride(), 5).fill_(False)
    _assert_updates_like_oracle(make_inputs(3, 1, H, HV, K, V), pool)
    assert (buffer[gaps] == -7777.0).all()


def test_parts_of_a_projection_are_read_where_they_are():
    tokens = make_inputs(3, 1, H, HV, K, V).map(_part_of_projection)
    _assert_updates_like_oracle(tokens, make_state(SLOTS, HV, V, K), use_qk_l2norm=True)


def test_heads_of_any_size_are_inlined():
    """Sums of few terms become part of their readers, which come after the state is written."""
    for K, V in ((1, 1), (3, 2), (8, 130)):
        tokens, pool = make_inputs(2, 1, 1, 3, K, V), make_state(3, 3, V, K)
        exact, plain = witnesses(oracle.delta_rule_into_pool, *tokens, pool)
        o, _ = _compile(gdn_ops.recurrent_, *tokens, pool)
        assert_as_accurate_as_plain(o, exact[0], plain[0], terms=K, name="o")
        assert_as_accurate_as_plain(pool, exact[1], plain[1], terms=K, name="pool")


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_a_functional_step_is_inlined_and_leaves_its_state(dtype):
    tokens = make_inputs(3, 1, H, HV, K, V)
    state = None if dtype is None else make_state(3, HV, V, K, dtype)
    before = None if state is None else state.clone()
    exact, plain = witnesses(oracle.delta_rule, *tokens, state)
    results, code = _compile(gdn_ops.recurrent, *tokens, state)
    assert _is_inlined(code)
    for values in zip(results, exact, plain, ("o", "final_state"), strict=True):
        assert_as_accurate_as_plain(*values[:3], terms=K, name=values[3])
    assert results[1].dtype == (dtype or torch.float32)
    if before is not None:
        assert_bitwise_equal(state, before, "initial_state")


def _assert_convolves_like_oracle(tensors, pool, activation="silu"):
    exact, plain = witnesses(oracle.convolution_into_pool, *tensors, pool, activation=activation)
    expected = pool.clone()
    gdn_ops.causal_conv1d_(*tensors, expected, activation=activation)
    y, code = _compile(gdn_ops.causal_conv1d_, *tensors, pool, activation=activation)
    assert _is_inlined(code)
    assert_as_accurate_as_plain(y, exact[0], plain[0], terms=W, name="y")
    assert_bitwise_equal(pool, expected, "state")


@pytest.mark.parametrize(
    ("dtype", "state", "columns", "activation"),
    [
        (torch.float32, torch.float32, 0, "silu"),
        (torch.float32, torch.bfloat16, 3, None),
        (torch.bfloat16, torch.float32, 3, "silu"),
        (torch.bfloat16, torch.bfloat16, 0, None),
    ],
    ids=str,
)
def test_an_inlined_convolution_is_as_exact_and_moves_its_columns(
    dtype, state, columns, activation
):
    pool = torch.randn(SLOTS, D, W - 1 + columns).to(state)
    _assert_convolves_like_oracle(make_convolution(3, 1, D, W, dtype), pool, activation)


@pytest.mark.parametrize("W", [2, 3, 6])
def test_a_convolution_of_any_width_is_inlined(W):
    """In memory whose channels are adjacent, as a serving engine may have it."""
    pool = torch.randn(SLOTS, W - 1, D).mT
    x, weight, _ = make_convolution(2, 1, D, W)
    _assert_convolves_like_oracle((x, weight, None), pool)


def _decode(x, weight, bias, columns, g, beta, pool):
    """The heart of a layer."""
    y = gdn_ops.causal_conv1d_(x, weight, bias, columns, activation="silu")
    q, k, v = y.split([H * K, H * K, HV * V], -1)
    q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V))
    return silu(gdn_ops.recurrent_(q, k, v, g, beta, pool, use_qk_l2norm=True))


def _decode_inputs(B, slots):
    channels = 2 * H * K + HV * V
    x, weight, bias = make_convolution(B, 1, channels, W)
    *_, g, beta = make_inputs(B, 1, H, HV, K, V)
    return [
        x,
        weight,
        bias,
        torch.ones(slots, channels, W - 1),
        g,
        beta,
        make_state(slots, HV, V, K),
    ]


@pytest.mark.parametrize("slots", [3, 4])
def test_a_decode_step_is_one_piece_of_code_that_copies_no_pool(slots):
    inputs = _decode_inputs(3, slots)
    expected_inputs = [x.clone() for x in inputs]
    expected = _decode(*expected_inputs)
    places = [x.data_ptr() for x in inputs]
    result, code = _compile(_decode, *inputs)
    assert _is_inlined(code)
    assert [x.data_ptr() for x in inputs] == places
    _assert_allocates_no(inputs[-1], code)
    for x, y in zip((result, *inputs), (expected, *expected_inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_one_code_serves_every_batch():
    compiled = torch.compile(_decode, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for B in (2, 3, 5):
            inputs = _decode_inputs(B, B)
            expected_inputs = [x.clone() for x in inputs]
            expected = _decode(*expected_inputs)
            result = compiled(*inputs)
            for x, y in zip((result, *inputs), (expected, *expected_inputs), strict=True):
                torch.testing.assert_close(x, y)


def test_two_steps_on_one_pool_and_reads_around_them_keep_their_order():
    def steps(q, k, v, g, beta, pool):
        before = pool.sum((-1, -2))
        o = gdn_ops.recurrent_(q, k, v, g, beta, pool)
        between = pool.sum((-1, -2))
        o = gdn_ops.recurrent_(q, k, o, g, beta, pool)
        return before, between, o, pool.sum((-1, -2))

    tokens, pool = make_inputs(3, 1, H, HV, K, V), make_state(3, HV, V, K)
    expected_pool = pool.clone()
    expected = steps(*tokens, expected_pool)
    results, code = _compile(steps, *tokens, pool)
    assert _is_inlined(code)
    for x, y in zip((*results, pool), (*expected, expected_pool), strict=True):
        torch.testing.assert_close(x, y)


OPAQUE = {
    "several-tokens": lambda: (make_inputs(2, 2, H, HV, K, V), {}),
    "slots-by-index": lambda: (_one(), {"state_indices": indices([3, -1])}),
    "table": lambda: (
        _one(),
        {"state_indices": indices([[3], [1]]), "num_accepted_tokens": indices([1, 1])},
    ),
    "packed": lambda: (make_inputs(1, 1, H, HV, K, V), {"cu_seqlens": cu_seqlens([1, 0])}),
    "read-slots": lambda: (_one(), {"read_indices": indices([4, 3])}),
    "mixed-dtypes": lambda: (make_inputs(2, 1, H, HV, K, V, torch.float16), {}),
    "padding-rows": lambda: (_one(), {"null_index": 0}),
}


def _one():
    return make_inputs(2, 1, H, HV, K, V)


@pytest.mark.parametrize("case", OPAQUE)
def test_what_no_rule_serves_is_an_opaque_call_with_the_same_bits(case):
    tokens, options = OPAQUE[case]()
    pool = make_state(SLOTS, HV, V, K, torch.bfloat16)
    expected_pool = pool.clone()
    expected = gdn_ops.recurrent_(*tokens, expected_pool, **options)
    o, code = _compile(gdn_ops.recurrent_, *tokens, pool, **options)
    assert "torch.ops.gdn.recurrent_.default(" in code
    assert_bitwise_equal(o, expected, "o")
    assert_bitwise_equal(pool, expected_pool, "pool")


def test_a_rule_that_fails_leaves_the_operator_opaque(monkeypatch):
    def fail(*_):
        raise RuntimeError("injected")

    monkeypatch.setattr(cpu, "_write", fail)
    rules._say_once.cache_clear()
    tokens, pool = make_inputs(2, 1, H, HV, K, V), make_state(3, HV, V, K)
    expected_pool = pool.clone()
    expected = gdn_ops.recurrent_(*tokens, expected_pool, scale=0.25)
    with torch.compiler.config.patch(cache_key_tag="a failing rule"):
        o, code = _compile(gdn_ops.recurrent_, *tokens, pool, scale=0.25)
    assert "torch.ops.gdn.recurrent_.default(" in code
    assert_bitwise_equal(o, expected, "o")
    assert_bitwise_equal(pool, expected_pool, "pool")
