"""``exact=True``: verify leaves the bits of decode, whatever was drafted and accepted before."""

import os
import random

import pytest
import torch
from inputs import cu_seqlens, indices, make_inputs, make_state
from tolerance import assert_bitwise_equal

from gdn_ops import recurrent_

KERNELS_ARE_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
H, HV, K, V = 2, 4, 16, 8
POOLS = [torch.float32, torch.bfloat16, torch.float16]


def _tokens(B, T, device="cpu", sizes=(H, HV, K, V), **options):
    return make_inputs(B, T, *sizes, device=device, **options)


def _decode(tokens, state, **options):
    """One token after the other on slot 0: outputs and the state after each token."""
    pool, o, states = state.clone(), [], []
    for t in range(tokens.q.shape[1]):
        one = (x[:, t : t + 1].clone() for x in tokens)
        o.append(recurrent_(*one, pool, exact=True, **options))
        states.append(pool.clone())
    return torch.cat(o, 1), torch.cat(states)


def _verify(tokens, state, S, choose, call=recurrent_, **options):
    """The same by steps of 1 to S tokens, of which some are rejected and come again.

    What is rejected is another token than the one that comes in its place.
    """
    T = tokens.q.shape[1]
    pool = torch.cat([state, state.new_full((S, *state.shape[1:]), torch.nan)])
    table = torch.arange(S + 1, device=state.device)[None]
    first = indices([0], device=state.device)
    o, states, done, accepted = [], [], 0, None
    while done < T:
        L = min(choose.randint(1, S), T - done)
        keep = choose.randint(1, L)
        drafted = [x[:, done : done + L].clone() for x in tokens]
        for x in drafted:
            x[:, keep:] = x[:, keep:].flip(-1) * 0.5
        # The first step reads slot 0, later ones the slot of the last accepted token.
        columns = table[:, 1:].clone()
        read = first if accepted is None else None
        count = None if accepted is None else indices([accepted], device=state.device)
        y = call(*drafted, pool, columns, count, None, read, exact=True, **options)
        o.append(y[:, :keep])
        states.append(pool[1 : keep + 1].clone())
        done, accepted = done + keep, keep
    return torch.cat(o, 1), torch.cat(states)


def _assert_same(actual, expected):
    assert_bitwise_equal(actual[0], expected[0], "o")
    assert_bitwise_equal(actual[1], expected[1], "states")


@pytest.mark.parametrize("pool_dtype", POOLS, ids=str)
def test_verify_with_rejections_leaves_the_bits_of_decode(pool_dtype, device):
    """10 000 tokens; a few where the kernel is interpreted."""
    T = 12 if KERNELS_ARE_INTERPRETED else 10_000
    tokens, state = _tokens(1, T, device), make_state(1, HV, V, K, pool_dtype, device=device)
    options = {"use_qk_l2norm": True}
    expected = _decode(tokens, state, **options)
    _assert_same(_verify(tokens, state, 4, random.Random(1), **options), expected)


@pytest.mark.parametrize("kda", [False, True], ids=["", "kda"])
@pytest.mark.parametrize("sizes", [(1, 3, 20, 6), (3, 3, 33, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_verify_leaves_the_bits_of_decode_at_all_sizes(dtype, sizes, kda, device):
    tokens = _tokens(1, 6, device, sizes, dtype=dtype, kda=kda)
    state = make_state(1, *(sizes[i] for i in (1, 3, 2)), torch.bfloat16, device=device)
    _assert_same(_verify(tokens, state, 5, random.Random(2)), _decode(tokens, state))


@pytest.mark.parametrize("pool_dtype", POOLS, ids=str)
def test_rows_and_forms_of_a_call_do_not_change_a_bit(pool_dtype, device):
    """Rows together, packed, with slots or tables, with strides and addresses of any kind."""
    B, T = 3, 4
    tokens = _tokens(B, T, device, dtype=torch.bfloat16)
    start = make_state(B, HV, V, K, pool_dtype, device=device)
    rows = [
        _decode(tokens.map(lambda x, n=n: x[n : n + 1]), start[n : n + 1], use_qk_l2norm=True)
        for n in range(B)
    ]
    expected = torch.cat([o for o, _ in rows]), torch.stack([s for _, s in rows])
    options = {"use_qk_l2norm": True, "exact": True}

    def assert_last(o, pool):
        assert_bitwise_equal(o.view(expected[0].shape), expected[0], "o")
        assert_bitwise_equal(pool, expected[1][:, -1], "states")

    pool = start.clone()
    assert_last(recurrent_(*tokens, pool, **options), pool)

    packed, pool = tokens.map(lambda x: x.reshape(1, B * T, *x.shape[2:])), start.clone()
    bounds = cu_seqlens([T] * B, device=device)
    o = recurrent_(*packed, pool, None, None, bounds, **options)
    assert_last(o, pool)

    padded = [
        torch.nn.functional.pad(x, [0, 1, *[0, 0] * (x.dim() - 3), 1, 2])[
            :, 1 : 1 + T, ..., : x.shape[-1]
        ]
        for x in tokens
    ]
    slots = indices([4, 1, 6], device=device)
    wide = start.new_zeros(8, HV + 1, V, K)[:, 1:]
    wide[slots] = start
    o = recurrent_(*padded, wide, slots, **options)
    assert_last(o, wide[slots])

    table = torch.arange(B * T, device=device).view(B, T)
    pool = start.new_zeros(B * T, HV, V, K)
    pool[table[:, 0]] = start
    o = recurrent_(*tokens, pool, table, **options)
    assert_bitwise_equal(o, expected[0], "o")
    assert_bitwise_equal(pool.view(expected[1].shape), expected[1], "states")


def test_a_16_bit_state_is_rounded_after_each_token_only_if_exact(device):
    tokens = _tokens(1, 8, device)
    start = make_state(1, HV, V, K, torch.bfloat16, device=device)
    exact, plain = start.clone(), start.clone()
    recurrent_(*tokens, exact, exact=True)
    recurrent_(*tokens, plain)
    _, states = _decode(tokens, start)
    assert_bitwise_equal(exact, states[-1:], "exact")
    assert not torch.equal(plain, exact)


@pytest.mark.skipif(KERNELS_ARE_INTERPRETED, reason="compiled code calls the operator for a CPU")
@pytest.mark.parametrize("pool_dtype", POOLS, ids=str)
def test_compiled_calls_leave_the_bits_of_eager_ones(pool_dtype, device):
    """Compiled for each number of tokens, decode of one slot a row included."""
    torch.compiler.reset()
    compiled = torch.compile(recurrent_, fullgraph=True)
    tokens, state = _tokens(1, 8, device), make_state(1, HV, V, K, pool_dtype, device=device)
    expected = _decode(tokens, state, use_qk_l2norm=True)
    actual = _verify(tokens, state, 2, random.Random(3), compiled, use_qk_l2norm=True)
    _assert_same(actual, expected)
    pool = state.clone()
    for t in range(4):
        o = compiled(*(x[:, t : t + 1] for x in tokens), pool, use_qk_l2norm=True, exact=True)
        assert_bitwise_equal(o, expected[0][:, t : t + 1], "o")
        assert_bitwise_equal(pool, expected[1][t : t + 1], "state")


@pytest.mark.parametrize("pool_dtype", POOLS, ids=str)
def test_exact_is_the_same_function(pool_dtype, device):
    """One token from one state, where both round alike: the same up to the order of a sum."""
    tokens = _tokens(3, 1, device)
    pools = [make_state(3, HV, V, K, pool_dtype, device=device) for _ in range(2)]
    o, plain = (
        recurrent_(*tokens, p, use_qk_l2norm=True, exact=e)
        for p, e in zip(pools, (True, False), strict=True)
    )
    eps = torch.finfo(torch.float32).eps
    assert (o - plain).abs().max() <= K * eps * plain.abs().max()
    unit = torch.finfo(pool_dtype).eps
    close = pools[1].float().abs().max() * (unit + K * eps)
    assert (pools[0].float() - pools[1].float()).abs().max() <= close


def _arithmetic(facts):
    """How often each instruction occurs that makes, rounds or moves a floating-point number."""
    makers = ("FFMA", "FADD", "FMUL", "MUFU", "SHFL", "F2F", "F2FP")
    return {name: n for name, n in facts.opcodes.items() if name.split(".")[0] in makers}


def _forms():
    """Calls of ``recurrent_`` at a model's sizes, each of its own kind."""
    from launches_to_compile import integers, states, tokens

    pool = states(64, torch.bfloat16)
    slots, table, accepted = integers(16), integers(16, 4), integers(16)
    bounds = integers(17)
    wide = [x[:, 1:] for x in tokens(16, 5)]
    return {
        "decode": (*tokens(16, 1), pool, slots),
        "decode without slots": (*tokens(16, 1), pool),
        "several tokens": (*tokens(16, 4), pool, slots),
        "verify": (*tokens(16, 4), pool, table, accepted),
        "verify one token": (*tokens(16, 1), pool, table, accepted),
        "packed": (*tokens(1, 40), pool, table, accepted, bounds),
        "strided": (*wide, pool, table, accepted),
    }


@pytest.mark.skipif(KERNELS_ARE_INTERPRETED, reason="the interpreter compiles nothing")
def test_every_form_compiles_to_the_same_arithmetic():
    """The loop body of each, eager or lowered, has the instructions that the formula has.

    All fused multiply-adds are the kernel's own: three for each number of the state that a lane
    holds (of ``S k``, ``S + u k^T`` and ``S q``) and one for each number of q and k, for the norms.
    One more would be a contraction, which is the compiler's choice.
    """
    pytest.importorskip("triton")
    from benchmarks.static.launches import record
    from gdn_ops.kernels.recurrent import recurrent_ as launching
    from lowering.fake_gpu import generate
    from lowering.sass import compile_generated, compile_kernel

    options = {"use_qk_l2norm": True, "exact": True}
    found = {}
    for name, args in _forms().items():
        (launch,) = record(lambda args=args: launching(*args, **options), "sm_90")
        typed, constants, divisible = launch.signature()
        compiled = compile_kernel(
            launch.fn, typed, constants, num_warps=launch.num_warps, divisible=divisible
        )
        found[name] = _arithmetic(compiled)
    for name in ("decode", "verify"):
        (module,) = generate(lambda *args: recurrent_(*args, **options), _forms()[name])
        (kernel,) = [launch.kernel for launch in module.launches]
        compiled = compile_generated(kernel, kernel.configs[0], "sm_90")
        found[f"{name} lowered"] = _arithmetic(compiled)
    BV = 16
    assert found["decode"]["FFMA"] == 3 * BV * 128 // 32 + 2 * 4
    for name, counts in found.items():
        assert counts == found["decode"], name
