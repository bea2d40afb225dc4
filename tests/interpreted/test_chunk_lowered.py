"""Generated prefills that store their output by a descriptor, against the float64 loop."""

import re

import oracle
import pytest
import torch
from generated import run
from inputs import cu_seqlens, indices, make_inputs, make_state
from tolerance import (
    assert_all_as_accurate_as_plain,
    assert_as_accurate_as_plain,
    operands_of,
    witnesses,
)

import gdn_ops
from gdn_ops.kernels import chunk_prepared, configs
from lowering.fake_gpu import generate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

H, HV, K, V = 2, 4, 16, 24
DTYPE = torch.bfloat16
OPERANDS = operands_of(gdn_ops.chunk, DTYPE)


def _run(function, args, rows=16, **flags):
    """What the generated module returns, once its scan is that of this form and so many rows."""
    (module,) = generate(function, args)
    for name, value in {"USE_DESCRIPTOR_STORE": True, "BV": rows, **flags}.items():
        assert re.findall(rf"{name} : tl\.constexpr = (\w+)", module.code) == [str(value)]
    return run(module.code, [x for x in module.inputs if x is not None])


@pytest.mark.parametrize("is_tight", [False, True], ids=["decays first", "store first"])
@pytest.mark.parametrize("lengths", [None, (3, 0, 70, 1)], ids=["batch", "packed"])
def test_the_output_and_what_reads_it_are_as_accurate_as_the_plain_loop(
    lengths, is_tight, monkeypatch
):
    """The reader is a norm, which waits for a reduction of the output."""
    monkeypatch.setattr(configs, "TIGHT", {"sm_90": (0, 0)} if is_tight else {})
    tokens = make_inputs(*((2, 67) if lengths is None else (1, 80)), H, HV, K, V, DTYPE)
    bounds = None if lengths is None else cu_seqlens(lengths)
    state = make_state(2 if lengths is None else len(lengths), HV, V, K)

    def layer(*args):
        o, final = gdn_ops.chunk(*args, use_qk_l2norm=True)
        return o, final, torch.nn.functional.rms_norm(o.float(), (V,), eps=1e-6)

    args = (*tokens, state, bounds)
    o, final, normed = _run(layer, args, STORES_FIRST=is_tight)
    found = witnesses(oracle.delta_rule, *args, use_qk_l2norm=True, operands=OPERANDS)
    assert_all_as_accurate_as_plain((o, final), *found, terms=K)
    twins = (o.double(), o.float())
    norms = [torch.nn.functional.rms_norm(x, (V,), eps=1e-6) for x in twins]
    assert_as_accurate_as_plain(normed, *norms, terms=V, name="norm")


@pytest.mark.parametrize("lengths", [None, (3, 0, 70, 1)], ids=["batch", "packed"])
@pytest.mark.parametrize("heads", [1, 2])
def test_gates_that_a_prefill_computes_itself_are_those_of_the_plain_loop(
    heads, lengths, monkeypatch
):
    """From views of one projection, of which nothing is read past a sequence's end."""
    choose = chunk_prepared.prepare_choice
    places = 1 if heads == 1 else 10**6
    monkeypatch.setattr(chunk_prepared, "prepare_choice", lambda *args: choose(*args[:-1], places))
    tokens = make_inputs(*((2, 67) if lengths is None else (1, 80)), H, HV, K, V, DTYPE)
    projected = torch.randn(*tokens.g.shape[:2], 2 * HV, dtype=DTYPE)
    rate, bias = torch.rand(2, HV)
    bounds = None if lengths is None else cu_seqlens(lengths)
    pool, slots = make_state(7, HV, V, K), indices([6, 1, -1, 2] if lengths else [3, 0])

    def gates(projected, rate, bias):
        a, b = projected.chunk(2, -1)
        return gdn_ops.gdn_gate(a, rate, bias), b.float().sigmoid()

    def layer(q, k, v, projected, rate, bias, *rows):
        return gdn_ops.chunk_(q, k, v, *gates(projected, rate, bias), *rows)

    args = (*tokens[:3], projected, rate, bias, pool.clone(), slots, None, bounds)
    (module,) = generate(layer, args)
    assert f"HEADS : tl.constexpr = {heads}" in module.code
    assert len(module.launches) == 2
    (o,) = run(module.code, [x for x in module.inputs if x is not None])
    found = witnesses(
        oracle.delta_rule_into_pool,
        *(*tokens[:3], *gates(projected, rate, bias), pool, slots),
        cu_seqlens=bounds,
        operands=OPERANDS,
    )
    assert_all_as_accurate_as_plain((o, args[6]), *found, terms=K, names=("o", "pool"))


def test_a_pool_and_rows_of_padding_are_as_in_the_plain_loop():
    """The output of a row without a slot, and of tokens of no row, is zero."""
    tokens, pool = make_inputs(1, 80, H, HV, K, V, DTYPE), make_state(7, HV, V, K)
    slots, bounds = indices([6, 1, -1, 2]), cu_seqlens([3, 0, 5, 68])
    args = (*tokens, pool.clone(), slots, None, bounds)
    (o,) = _run(lambda *args: gdn_ops.chunk_(*args), args)
    found = witnesses(
        oracle.delta_rule_into_pool,
        *(*tokens, pool, slots),
        cu_seqlens=bounds,
        operands=OPERANDS,
    )
    assert_all_as_accurate_as_plain((o, args[5]), *found, terms=K, names=("o", "pool"))
    assert not o[:, 3:8].any()
    assert not o[:, 76:].any()


def test_many_heads_of_128_rows_each_are_as_accurate_as_the_plain_loop():
    tokens = make_inputs(17, 2, 1, 4, 64, 128, DTYPE)
    o, final = _run(gdn_ops.chunk, tokens, rows=128)
    found = witnesses(oracle.delta_rule, *tokens, operands=OPERANDS)
    assert_all_as_accurate_as_plain((o, final), *found, terms=64)
