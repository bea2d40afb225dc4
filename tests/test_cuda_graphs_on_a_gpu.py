"""``mode="reduce-overhead"`` on a GPU: everything is captured, and does what eager operators do."""

import pytest
import torch
from inputs import indices, make_convolution, make_inputs, make_state
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code  # noqa: TID251

import gdn_ops
from gdn_ops.kernels import chunk_hopper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("cuda"),
    # With an empty graph torch's CUDA-graph trees keep their memory.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

H, HV, K, V, D = 4, 8, 128, 128, 512
SLOTS = (5, 0, 2)


def _tokens(T):
    return make_inputs(3, T, H, HV, K, V, torch.bfloat16, device="cuda")


def _assert_close(actual, expected):
    assert (actual - expected).norm() <= 2**-7 * expected.norm()


@pytest.mark.parametrize("kind", ["prefill", "convolution"])
def test_steps_on_a_static_pool_are_captured(kind):
    if kind == "prefill":
        arguments = (*_tokens(200), indices(SLOTS, device="cuda"))
        first = make_state(6, HV, V, K, device="cuda")

        def step(pool, q, k, v, g, beta, slots):
            return gdn_ops.chunk_(q, k, v, g, beta, pool, slots)

    else:
        x, weight, bias = make_convolution(3, 200, D, 4, torch.bfloat16, device="cuda")
        arguments = (x, weight, bias, indices(SLOTS, device="cuda"))
        first = torch.randn(6, D, 3, dtype=torch.bfloat16, device="cuda")

        def step(pool, x, weight, bias, slots):
            return gdn_ops.causal_conv1d_(x, weight, bias, pool, slots, activation="silu")

    pools = [first, first.clone()]
    torch._dynamo.mark_static_address(pools[1], guard=False)
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        expected = step(pools[0], *arguments)
        torch.compiler.cudagraph_mark_step_begin()
        _assert_close(compiled(pools[1], *arguments), expected)
        _assert_close(pools[1], pools[0])
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.skipif(not chunk_hopper.has_gluon(), reason="this Triton has no such kernels")
@pytest.mark.parametrize(("N", "T"), [(3, 700), (20, 128)], ids=["two kernels", "one kernel"])
def test_a_captured_call_has_the_bits_of_an_eager_one_and_follows_its_slots(N, T):
    """Of many tokens the operator is called, whose kernels in Gluon are no templates."""
    q, k, v, g, beta = make_inputs(N, T, H, HV, K, V, torch.bfloat16, device="cuda")

    def step(pool, q, k, v, g, beta, slots):
        return gdn_ops.chunk_(q, k, v, g, 1 - beta, pool, slots, use_qk_l2norm=True)

    pools = [make_state(2 * N, HV, V, K, device="cuda") for _ in range(2)]
    torch._dynamo.mark_static_address(pools[1], guard=False)
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead", dynamic=False)
    for i in range(4):
        slots = torch.arange(i, i + N, device="cuda", dtype=torch.int32)
        slots[i % N] = -1
        arguments = (q.roll(i, 1), k, v.roll(i, 1), g, beta, slots)
        expected = step(pools[0], *arguments)
        torch.compiler.cudagraph_mark_step_begin()
        o, code = run_and_get_code(compiled, pools[1], *arguments)
        assert i or "torch.ops.gdn.chunk_.default(" in code[0]
        assert torch.equal(o, expected)
        assert torch.equal(pools[1], pools[0])
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_a_training_step_is_captured():
    tokens = _tokens(200)

    def step(call):
        leaves = [x.detach().clone().requires_grad_() for x in tokens]
        torch.compiler.cudagraph_mark_step_begin()
        o, _ = call(*leaves)
        return torch.autograd.grad(o.float().square().sum(), leaves)

    expected = step(gdn_ops.chunk)
    counters.clear()
    compiled = torch.compile(gdn_ops.chunk, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        for x, y in zip(step(compiled), expected, strict=True):
            _assert_close(x, y)
    assert counters["inductor"]["cudagraph_skips"] == 0
