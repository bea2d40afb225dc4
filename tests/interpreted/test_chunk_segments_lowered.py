"""Generated prefills that walk a sequence in segments, against the float64 loop."""

import oracle
import pytest
import torch
from generated import run
from inputs import cu_seqlens, indices, make_inputs, make_state
from tolerance import assert_all_as_accurate_as_plain, operands_of, witnesses

import gdn_ops
from lowering.fake_gpu import generate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

H, HV, K, V = 1, 2, 16, 24
DTYPE = torch.bfloat16
OPERANDS = operands_of(gdn_ops.chunk, DTYPE)
LENGTHS = (3, 0, 130, 1, 64)


@pytest.fixture(autouse=True)
def segments_of_a_chunk(monkeypatch):
    from gdn_ops.kernels import chunk_segments

    monkeypatch.setattr(
        chunk_segments, "choose", lambda *_, **__: chunk_segments.Split(SEGMENTS=1000, LEAST=1)
    )


def _tokens(B, T):
    """Memories that last from the first segment to the last."""
    tokens = make_inputs(B, T, H, HV, K, V, DTYPE, strong_decay=False)
    return tokens._replace(g=tokens.g / 32)


def _run(function, args, dynamic=None):
    (module,) = generate(function, args, dynamic=dynamic)
    for stage in ("prepare", "carry", "chain", "scan"):
        assert f"# gdn_chunk_{stage}: " in module.code
    return run(module.code, module.inputs)


@pytest.mark.parametrize("dynamic", [None, True], ids=["numbers", "symbols"])
@pytest.mark.parametrize("is_fused", [False, True], ids=["late", "fused"])
def test_segments_of_a_batch_are_as_accurate_as_the_plain_loop(is_fused, dynamic):
    def layer(*args):
        o, final = gdn_ops.chunk(*args, use_qk_l2norm=True)
        return o * 2 if is_fused else o, final

    args = (*_tokens(2, 200), make_state(2, HV, V, K))
    o, final = _run(layer, args, dynamic)
    found = witnesses(oracle.delta_rule, *args, use_qk_l2norm=True, operands=OPERANDS)
    o = o / 2 if is_fused else o
    assert_all_as_accurate_as_plain((o, final), *found, terms=K)


@pytest.mark.parametrize("dynamic", [None, True], ids=["numbers", "symbols"])
def test_segments_of_packed_rows_update_their_slots_alone(dynamic):
    """What the scan writes into the pool, the chain has read before."""
    T = sum(LENGTHS) + 70
    tokens, pool = _tokens(1, T), make_state(7, HV, V, K)
    slots, bounds = indices([6, 1, 2, -1, 0]), cu_seqlens(LENGTHS)
    args = (*tokens, pool.clone(), slots, None, bounds)
    (o,) = _run(lambda *args: gdn_ops.chunk_(*args), args, dynamic)
    exact, plain = witnesses(
        oracle.delta_rule_into_pool,
        *(*tokens, pool, slots),
        cu_seqlens=bounds,
        operands=OPERANDS,
    )
    assert_all_as_accurate_as_plain((o, args[5]), exact, plain, terms=K, names=("o", "pool"))
    assert not o[:, 133:134].any()
    assert not o[:, sum(LENGTHS) :].any()


def test_segments_begin_with_no_state_where_none_is_given():
    args = _tokens(1, 130)
    found = witnesses(oracle.delta_rule, *args, operands=OPERANDS)
    assert_all_as_accurate_as_plain(_run(gdn_ops.chunk, args), *found, terms=K)
