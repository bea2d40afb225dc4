"""Generated modules, run in Triton's interpreter, against the float64 loop."""

import oracle
import pytest
import torch
from generated import run
from inputs import cu_seqlens, indices, make_inputs, make_state
from tolerance import assert_as_accurate_as_plain, assert_bitwise_equal, witnesses

import gdn_ops
from lowering.fake_gpu import generate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

H, HV, K, V = 2, 4, 16, 24
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _tokens(B, T, dtype=torch.float32):
    return make_inputs(B, T, H, HV, K, V, dtype)


def _results(function, *args):
    """What the generated module returns and leaves in its arguments, which are copies."""
    args = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)
    (module,) = generate(function, args)
    assert ".default(" not in module.code, "an opaque call"
    outputs = run(module.code, [x for x in module.inputs if x is not None])
    return outputs, args


@DTYPES
@pytest.mark.parametrize("name", ["recurrent", "chunk"])
@pytest.mark.parametrize("lengths", [None, (3, 0, 70, 1)], ids=["batch", "packed"])
def test_a_lowered_operator_is_as_accurate_as_the_plain_loop(name, lengths, dtype):
    tokens = _tokens(2, 67, dtype) if lengths is None else _tokens(1, 80, dtype)
    bounds = None if lengths is None else cu_seqlens(lengths)
    state = make_state(2 if lengths is None else len(lengths), HV, V, K)

    def doubled(*args):
        o, final = getattr(gdn_ops, name)(*args)
        return o.float() * 2, final

    (o, final), _ = _results(doubled, *tokens, state, bounds)
    exact, plain = witnesses(oracle.delta_rule, *tokens, state, bounds)
    if name == "chunk" and dtype == torch.bfloat16:
        # Operands of the products are bfloat16 too.
        for x, y in ((o / 2, exact[0]), (final, exact[1])):
            assert (x.double() - y).norm() <= 2 * torch.finfo(dtype).eps * y.norm()
        return
    # Doubling is exact, so the fused epilogue shows in nothing but the factor.
    assert_as_accurate_as_plain((o / 2).to(dtype), exact[0], plain[0], terms=K, name="o")
    assert_as_accurate_as_plain(final, exact[1], plain[1], terms=K, name="state")


@DTYPES
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lowered_step_updates_the_pool_as_the_plain_loop_does(state_dtype, dtype):
    """Decode rows, verify rows, rows of padding and tokens of no row."""
    tokens, pool = _tokens(1, 12, dtype), make_state(20, HV, V, K, state_dtype)
    table = torch.arange(20, dtype=torch.int32).view(5, 4).flip(0).contiguous()
    table[4] = -1
    accepted, bounds = indices([3, 1, 2, 4, 1]), cu_seqlens([1, 4, 0, 2, 3])

    def layer(*args):
        return gdn_ops.recurrent_(*args) * 2

    args = (*tokens, pool, table, accepted, bounds)
    (o,), changed = _results(layer, *args)
    exact, plain = witnesses(oracle.delta_rule_into_pool, *args)
    assert_as_accurate_as_plain(o / 2, exact[0], plain[0], terms=K, name="o")
    assert_as_accurate_as_plain(changed[5], exact[1], plain[1], terms=K, name="pool")


@pytest.mark.parametrize("lengths", [None, (4, 0, 6)], ids=["batch", "packed"])
def test_a_few_lowered_tokens_update_the_pool_as_the_plain_loop_does(lengths):
    tokens = _tokens(3, 4, torch.bfloat16) if lengths is None else _tokens(1, 12, torch.bfloat16)
    bounds = None if lengths is None else cu_seqlens(lengths)
    args = (*tokens, make_state(4, HV, V, K, torch.bfloat16), indices([3, -1, 0]), None, bounds)

    def layer(*args):
        return gdn_ops.recurrent_(*args) * 2

    (o,), changed = _results(layer, *args)
    exact, plain = witnesses(oracle.delta_rule_into_pool, *args)
    assert_as_accurate_as_plain(o / 2, exact[0], plain[0], terms=K, name="o")
    assert_as_accurate_as_plain(changed[5], exact[1], plain[1], terms=K, name="pool")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "lengths", "slots"),
    [
        (1, None, [3, -1, 0]),
        (4, None, [3, -1, 0]),
        (8, None, [3, -1, 0]),
        (12, (4, 0, 6), [3, 1, 0]),
        (12, (4, 0, 6), [[5, 1, 2, 4, 6, 7], [-1] * 6, [9, 8, 10, 11, 0, 3]]),
    ],
    ids=["decode", "few tokens", "more tokens", "packed", "a state for each token"],
)
def test_gates_that_a_step_computes_itself_are_those_of_the_plain_loop(
    T, lengths, slots, state_dtype
):
    """From views of one projection; of rows of padding and past a row's end nothing is read."""
    tokens = _tokens(3 if lengths is None else 1, T, torch.bfloat16)
    projected = torch.randn(*tokens.g.shape[:2], 2 * HV, dtype=torch.bfloat16)
    rate, bias = torch.rand(2, HV)
    bounds = None if lengths is None else cu_seqlens(lengths)
    slots = torch.tensor(slots, dtype=torch.int32)
    accepted = None if slots.dim() == 1 else indices([1, 1, 2])
    pool = make_state(12, HV, V, K, state_dtype)

    def layer(q, k, v, projected, rate, bias, *states):
        a, b = projected.chunk(2, -1)
        g, beta = gdn_ops.gdn_gate(a, rate, bias), b.float().sigmoid()
        return gdn_ops.recurrent_(q, k, v, g, beta, *states)

    states = (pool, slots, accepted, bounds)
    (o,), changed = _results(layer, *tokens[:3], projected, rate, bias, *states)
    a, b = projected.chunk(2, -1)
    gates = gdn_ops.gdn_gate(a, rate, bias), b.float().sigmoid()
    exact, plain = witnesses(oracle.delta_rule_into_pool, *tokens[:3], *gates, *states)
    assert_as_accurate_as_plain(o, exact[0], plain[0], terms=K, name="o")
    assert_as_accurate_as_plain(changed[6], exact[1], plain[1], terms=K, name="pool")


def test_a_lowered_prefill_updates_the_pool_as_the_plain_loop_does():
    tokens, pool = _tokens(1, 80), make_state(7, HV, V, K)
    slots, bounds = indices([6, 1, -1, 2]), cu_seqlens([3, 0, 5, 70])

    def layer(*args):
        return gdn_ops.chunk_(*args) * 2

    args = (*tokens, pool, slots, None, bounds)
    (o,), changed = _results(layer, *args)
    exact, plain = witnesses(oracle.delta_rule_into_pool, *args[:7], cu_seqlens=bounds)
    assert_as_accurate_as_plain(o / 2, exact[0], plain[0], terms=K, name="o")
    assert_as_accurate_as_plain(changed[5], exact[1], plain[1], terms=K, name="pool")


@pytest.mark.parametrize("T", [1, 3], ids=["decode", "verify"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lowered_exact_step_leaves_the_bits_of_the_kernel(state_dtype, T):
    """Whatever is fused into it: here a product."""
    tokens, pool = _tokens(2, T, torch.bfloat16), make_state(6, HV, V, K, state_dtype)
    table = torch.arange(6).view(2, 3)
    slots, accepted = (table, indices([2, 1])) if T > 1 else (table[:, 0], None)

    def doubled(*args):
        return gdn_ops.recurrent_(*args, exact=True, use_qk_l2norm=True).float() * 2

    expected = doubled(*tokens, before := pool.clone(), slots, accepted)
    (o,), args = _results(doubled, *tokens, pool, slots, accepted)
    assert_bitwise_equal(o, expected, "o")
    assert_bitwise_equal(args[5], before, "pool")
