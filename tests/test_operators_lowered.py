"""Laws of the generated code that hold for each operator alike: in place, fused, no waiting."""

import pytest
import torch
from inputs import cu_seqlens, indices, make_convolution, make_inputs, make_state
from torch.nn.functional import silu

import gdn_ops
from lowering.fake_gpu import generate
from lowering.generated import library_calls

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

B, H, HV, K, V, D, W, SLOTS = 3, 2, 4, 64, 64, 128, 4, 50
BF16 = torch.bfloat16
TABLE = torch.arange(12, dtype=torch.int32).view(3, 4)
ACCEPTED = indices([1, 4, 2])


def _tokens(T, B=B):
    return make_inputs(B, T, H, HV, K, V, BF16)


def _pool():
    return make_state(SLOTS, HV, V, K)


def _columns():
    return torch.zeros(SLOTS, D, W - 1 + 3, dtype=BF16)


# Operators in place: what comes before the pool, what makes one, what comes after it.
IN_PLACE = {
    "decode": (gdn_ops.recurrent_, lambda: _tokens(1), _pool, (indices([3, 1, -1]),)),
    "verify": (gdn_ops.recurrent_, lambda: _tokens(4), _pool, (TABLE, ACCEPTED)),
    "verify once": (gdn_ops.recurrent_, lambda: _tokens(8), _pool, (indices([3, 1, -1]),)),
    "prefill": (gdn_ops.chunk_, lambda: _tokens(70), _pool, (indices([3, 1, -1]),)),
    "prefill in segments": (gdn_ops.chunk_, lambda: _tokens(3000), _pool, (indices([3, 1, -1]),)),
    "convolution": (
        gdn_ops.causal_conv1d_,
        lambda: make_convolution(B, 4, D, W, BF16),
        _columns,
        (indices([3, 1, -1]), ACCEPTED),
    ),
}
TEMPLATES = {"prefill": 2, "prefill in segments": 4}  # of the others one


def _kinds(module):
    return [launch.kernel.kind for launch in module.launches]


class Layers(torch.nn.Module):
    """A step on each kind of pool: a buffer, an input twice, and two views of one input."""

    def __init__(self, operator, pool):
        super().__init__()
        self.operator = operator
        self.register_buffer("pool", pool)

    def forward(self, tokens, pool, pages, after):
        pools = (self.pool, pool, pool, pages[0], pages[1])
        return [self.operator(*tokens, each, *after) for each in pools]


@pytest.mark.parametrize("grad_mode", [True, False], ids=["", "no-grad"])
@pytest.mark.parametrize("step", IN_PLACE)
def test_no_pool_is_copied_wherever_it_lies(step, grad_mode):
    from torch._inductor.fx_passes.reinplace import ReinplaceCounters  # noqa: TID251

    operator, tokens, make, after = IN_PLACE[step]
    layers = Layers(operator, make())
    ReinplaceCounters.clear()
    with torch.set_grad_enabled(grad_mode):
        (module,) = generate(layers, (tokens(), make(), torch.stack([make(), make()]), after))
    assert sum(ReinplaceCounters._values.values()) == 0
    assert _kinds(module) == ["template"] * 5 * TEMPLATES.get(step, 1)
    # Nothing else is launched, and what is allocated is none of the pools.
    assert "copy_(" not in module.code
    assert f"empty_strided_cuda(({SLOTS}," not in module.code


@pytest.mark.parametrize("step", IN_PLACE)
def test_cuda_graphs_have_no_reason_to_skip_a_step_on_a_static_pool(step):
    operator, tokens, make, after = IN_PLACE[step]
    pool = make()
    torch._dynamo.mark_static_address(pool, guard=False)
    (module,) = generate(operator, (*tokens(), pool, *after), mode="reduce-overhead")
    assert set(_kinds(module)) == {"template"}
    assert module.cudagraph_skips == []


def _followed(o, z, residual, scale):
    """What may follow in a model: a gate and a residual; a cast; a scale and 8 bits."""
    gated = o * silu(z) + residual
    quantised = (o.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return gated, o.float(), quantised


@pytest.mark.parametrize("step", IN_PLACE)
def test_pointwise_work_with_more_inputs_and_several_consumers_is_fused(step):
    operator, tokens, make, after = IN_PLACE[step]

    def layer(tokens, pool, after, z, residual, scale):
        return _followed(operator(*tokens, pool, *after), z, residual, scale)

    x = tokens()
    like = x[0] if step == "convolution" else x.v
    more = (torch.ones_like(like), torch.ones_like(like), torch.ones(like.shape[-1]))
    (module,) = generate(layer, (x, make(), after, *more))
    assert _kinds(module) == ["template"] * TEMPLATES.get(step, 1)
    assert "tl.float8e4nv" in module.code


def _packed(name):
    """A call on packed rows, and its gradient where it has one."""
    bounds = cu_seqlens([5, 0, 60])
    if "conv" in name:
        tokens, pool = make_convolution(1, 70, D, W, BF16), _columns()
    else:
        tokens, pool = _tokens(70, B=1), _pool()
    if not name.endswith("_"):
        tokens = [x.requires_grad_() for x in tokens]
        return lambda *args: getattr(gdn_ops, name)(*args)[0], (*tokens, None, bounds)
    after = (indices([3, 1, -1]), None, bounds)
    return getattr(gdn_ops, name), (*tokens, pool, *after)


@pytest.mark.parametrize(
    "name",
    ["recurrent", "recurrent_", "chunk", "chunk_", "causal_conv1d", "causal_conv1d_"],
)
def test_packed_rows_do_not_synchronise_forward_or_backward(name):
    modules = generate(*_packed(name))
    assert len(modules) == (1 if name.endswith("_") else 2)
    for module in modules:
        assert "template" in _kinds(module)
        assert not [call for call in library_calls(module.code) if "ops.gdn." in call]
        for word in (".item()", ".tolist()", ".cpu()", "synchronize"):
            assert word not in module.code


@pytest.mark.parametrize(("padding", "fits"), [(8, True), (4, False)])
def test_rows_of_unknown_stride_are_read_by_descriptors_where_they_end_at_16_bytes(padding, fits):
    """Compiled with dynamic shapes a stride is a symbol: that of the example is looked at."""
    q, k, v, g, beta = _tokens(70)

    def padded(x):
        row = torch.zeros(B, 70, x[0, 0].numel() + padding, dtype=BF16)
        return row[..., : x[0, 0].numel()].view(x.shape)

    [module] = generate(gdn_ops.chunk, (padded(q), padded(k), padded(v), g, beta), dynamic=True)
    assert (f"USE_DESCRIPTORS : tl.constexpr = {fits}") in module.code
