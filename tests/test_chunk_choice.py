"""Laws of compiled prefills that call the operator, whose kernels in Gluon are no templates."""

import logging

import pytest
import torch
from inputs import cu_seqlens, indices
from launches_to_compile import new
from torch.nn.functional import softplus

import gdn_ops
from gdn_ops.kernels import chunk_hopper
from lowering.fake_gpu import generate
from lowering.generated import library_calls

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU"),
    pytest.mark.skipif(not chunk_hopper.has_gluon(), reason="this Triton has no such kernels"),
]

H, HV, SLOTS = 2, 4, 50
BF16 = torch.bfloat16


def tokens(B=3, T=1000, K=128, V=128, dtype=BF16):
    """q, k, v, and what gates are made of."""
    q, k, v = (new(B, T, *each, dtype=dtype) for each in ((H, K), (H, K), (HV, V)))
    return q, k, v, new(B, T, HV, dtype=dtype), new(B, T, HV, dtype=dtype)


def prefill(q, k, v, a, b, pool, slots, bounds=None):
    g = -softplus(a.float())
    return gdn_ops.chunk_(q, k, v, g, b.sigmoid(), pool, slots, None, bounds, use_qk_l2norm=True)


def pool_of(K=128, V=128):
    return new(SLOTS, HV, V, K, dtype=torch.float32)


SLOTS_OF = indices([3, 1, -1])
CALL, CALL_ = "torch.ops.gdn.chunk.default", "torch.ops.gdn.chunk_.default"
G = new(3, 1000, HV, dtype=torch.float32)
BACKWARD = "torch.ops.gdn.chunk_backward.default"


def calls(module):
    return {name: n for name, n in library_calls(module.code).items() if "ops.gdn." in name}


@pytest.mark.parametrize("is_packed", [False, True], ids=["batch", "packed"])
def test_a_prefill_of_many_tokens_is_one_call_inside_of_a_cuda_graph(is_packed, caplog):
    x, bounds = tokens(), None
    if is_packed:
        x, bounds = tokens(1, 3000), cu_seqlens([1000, 1000, 1000])
    pool = pool_of()
    torch._dynamo.mark_static_address(pool, guard=False)
    with caplog.at_level(logging.DEBUG, "lowering"), torch.no_grad():
        (module,) = generate(prefill, (*x, pool, SLOTS_OF, bounds), mode="reduce-overhead")
    assert calls(module) == {CALL_: 1}
    assert "gdn_chunk: stays a call of the operator: its kernels in Gluon are faster" in (
        caplog.messages
    )
    # One graph without a gap, after kernels for gates; nobody copies the pool.
    assert module.cudagraph_skips == []
    assert "partitions=[partition_0,]" in module.code
    assert {launch.kernel.kind for launch in module.launches} == {"pointwise"}
    assert f"empty_strided_cuda(({SLOTS}," not in module.code


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
def test_training_calls_the_operators_that_have_kernels_in_gluon(dtype, caplog):
    x = [y.requires_grad_() for y in (*tokens(dtype=dtype)[:3], G)]
    with caplog.at_level(logging.DEBUG, "lowering"):
        forward, backward = generate(gdn_ops.chunk, x, mode="reduce-overhead")
    is_called = dtype == BF16
    assert calls(forward) == {CALL: 1}
    assert calls(backward) == ({BACKWARD: 1} if is_called else {})
    assert forward.cudagraph_skips == backward.cudagraph_skips == []
    said = "gdn_chunk_backward: stays a call of the operator: its kernels are in Gluon"
    assert (said in caplog.messages) == is_called
    assert ("template" in {launch.kernel.kind for launch in backward.launches}) == (not is_called)


def test_lengths_that_are_not_known_have_one_module_which_calls():
    x = tokens(B=24)
    for y in x:
        torch._dynamo.mark_dynamic(y, 1)
    with torch.no_grad():
        (module,) = generate(prefill, (*x, pool_of(), indices(range(24))))
    assert calls(module) == {CALL_: 1}


def gated(*args):
    return prefill(*args) * args[2].sigmoid()


OTHERS = {
    "few tokens": (prefill, {"T": 300}, {}),
    "few channels": (prefill, {"K": 64}, {}),
    "float32": (prefill, {"dtype": torch.float32}, {}),
    "an operation to fuse": (gated, {}, {}),
    "another GPU": (prefill, {}, {"arch": "sm_100"}),
    "a split sequence": (prefill, {"B": 1, "T": 8192}, {}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_templates_serve_where_a_call_would_gain_nothing(case):
    function, sizes, options = OTHERS[case]
    pool = pool_of(sizes.get("K", 128))
    slots = SLOTS_OF[: sizes.get("B", 3)]
    with torch.no_grad():
        (module,) = generate(function, (*tokens(**sizes), pool, slots), **options)
    assert calls(module) == {}
    assert {launch.kernel.kind for launch in module.launches} == {"template"}


def test_templates_serve_where_triton_is_one_that_is_not_known(monkeypatch):
    monkeypatch.setattr(chunk_hopper, "GLUON", ())
    with torch.no_grad():
        (module,) = generate(prefill, (*tokens(), pool_of(), SLOTS_OF))
    assert calls(module) == {}
