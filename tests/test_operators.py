"""The operators as torch sees them: schemas, fakes and registrations."""

import textwrap

import expecttest
import pytest
import torch
from inputs import make_convolution, make_inputs, make_state
from operator_calls import CALLS, DIFFERENTIABLE, HV, D, H, K, V, W, fresh, operator
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

OPERATORS = sorted({name for name, *_ in CALLS.values()})
everywhere = pytest.mark.parametrize("case", CALLS)


def test_every_registered_operator_is_called_here():
    registered = [
        schema.name.removeprefix("gdn::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("gdn::")
    ]
    assert sorted(registered) == OPERATORS


def test_schemas_say_what_is_read_and_what_is_written():
    """A change here changes the interface: say so in CHANGELOG.md, then EXPECTTEST_ACCEPT=1."""
    schemas = [str(operator(name)._schema).removeprefix("gdn::") for name in OPERATORS]
    text = "\n".join(textwrap.fill(schema, 96, subsequent_indent="    ") for schema in schemas)
    expecttest.assert_expected_inline(
        text,
        """\
causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None, Tensor?
    cu_seqlens=None, *, str? activation=None) -> (Tensor y, Tensor final_state)
causal_conv1d_(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, Tensor?
    state_indices=None, Tensor? num_accepted_tokens=None, Tensor? cu_seqlens=None, *, str?
    activation=None, int null_index=-1) -> Tensor
causal_conv1d_backward(Tensor dy, Tensor dfinal_state, Tensor x, Tensor weight, Tensor?
    bias=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, *, str? activation=None) ->
    (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)
chunk(Tensor q, Tensor k, Tensor v, Tensor? g=None, Tensor? beta=None, Tensor?
    initial_state=None, Tensor? cu_seqlens=None, *, float? scale=None, bool use_qk_l2norm=False)
    -> (Tensor o, Tensor final_state)
chunk_(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor(a!) state, Tensor?
    state_indices, Tensor? has_initial_state=None, Tensor? cu_seqlens=None, Tensor?
    read_indices=None, *, float? scale=None, bool use_qk_l2norm=False, int null_index=-1) ->
    Tensor
chunk_backward(Tensor do, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor? g=None,
    Tensor? beta=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, *, float?
    scale=None, bool use_qk_l2norm=False) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor
    dbeta, Tensor dinitial_state)
recurrent(Tensor q, Tensor k, Tensor v, Tensor? g=None, Tensor? beta=None, Tensor?
    initial_state=None, Tensor? cu_seqlens=None, *, float? scale=None, bool use_qk_l2norm=False)
    -> (Tensor o, Tensor final_state)
recurrent_(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor(a!) state, Tensor?
    state_indices=None, Tensor? num_accepted_tokens=None, Tensor? cu_seqlens=None, Tensor?
    read_indices=None, *, float? scale=None, bool use_qk_l2norm=False, int null_index=-1, bool
    exact=False) -> Tensor
recurrent_backward(Tensor do, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor?
    g=None, Tensor? beta=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, *, float?
    scale=None, bool use_qk_l2norm=False) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor
    dbeta, Tensor dinitial_state)""",
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_tagged_for_the_compiler(name):
    tags = operator(name).tags
    assert torch.Tag.pt2_compliant_tag in tags
    assert torch.Tag.flexible_layout in tags


@everywhere
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_the_fake_has_the_shapes_strides_and_dtypes_of_the_real_result(case, layout):
    op, args, options = fresh(case)
    if layout == "strided":
        args = tuple(_strided(x) for x in args)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        expected = op(*fakes, **options)
    results = op(*args, **options)
    for x, fake in zip(_as_tuple(results), _as_tuple(expected), strict=True):
        assert x.shape == fake.shape
        assert x.stride() == fake.stride()
        assert (x.dtype, x.device) == (fake.dtype, fake.device)
        assert x.storage_offset() == fake.storage_offset() == 0


def _as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def _strided(x):
    """The same values with another order in memory, but for the matrices of a pool."""
    if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.shape[-2:] == (V, K):
        return x
    return x.movedim(1, 0).contiguous().movedim(0, 1)


@everywhere
def test_opcheck(case):
    op, args, options = fresh(case)
    torch.library.opcheck(op, args, options)


# torch 2.15's opcheck reads .grad of its own copies of what requires one.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("case", DIFFERENTIABLE)
def test_opcheck_with_gradients(case):
    op, args, options = fresh(case, requires_grad=True)
    torch.library.opcheck(op, args, options)


def _sizes(symbolic, *names):
    """A size for each name that nobody knows: to be read from data, or to vary between calls."""
    env = ShapeEnv()
    sizes = []
    for name in names:
        if symbolic == "unbacked":
            size = env.create_unbacked_symint()
            torch._check(size >= 1)
        else:
            from torch._dynamo.source import ConstantSource

            symbol = env.create_symbol(7 + len(sizes), ConstantSource(name))
            size = env.create_symintnode(symbol, hint=7 + len(sizes))
        sizes.append(size)
    return env, sizes


symbolics = pytest.mark.parametrize("symbolic", ["unbacked", "backed"])


def _is(size, expected):
    """The very expression, so that the compiler need not guard on the two being equal."""
    return size.node.expr == expected.node.expr


@symbolics
@pytest.mark.parametrize("name", ["chunk", "recurrent"])
def test_fakes_take_sizes_that_nobody_knows(name, symbolic):
    env, (B, T, P, N) = _sizes(symbolic, "B", "T", "P", "N")
    with FakeTensorMode(shape_env=env):
        tokens = _fake_tokens(B, T)
        o, final = operator(name)(*tokens)
        assert _is(o.shape[0], B)
        assert _is(o.shape[1], T)
        assert _is(final.shape[0], B)
        bounds = torch.empty(N + 1, dtype=torch.int32)
        states = torch.empty(N, HV, V, K, dtype=torch.bfloat16)
        o, final = operator(name)(*_fake_tokens(1, P), states, bounds)
        assert _is(o.shape[1], P)
        assert _is(final.shape[0], N)
        assert final.dtype == torch.bfloat16
        gradients = operator(f"{name}_backward")(o, final, *_fake_tokens(1, P), states, bounds)
        assert [tuple(map(str, x.shape)) for x in gradients[:2]] == [("1", str(P), "2", "8")] * 2
    assert not env.guards


@symbolics
def test_fakes_of_pools_take_sizes_that_nobody_knows(symbolic):
    env, (T, N, slots, S) = _sizes(symbolic, "T", "N", "slots", "S")
    with FakeTensorMode(shape_env=env):
        pool = torch.empty(slots, HV, V, K)
        bounds = torch.empty(N + 1, dtype=torch.int64)
        one, count = torch.empty(2, N, dtype=torch.int32).unbind()
        table = torch.empty(N, S, dtype=torch.int32)
        tokens = _fake_tokens(1, T)
        x, weight, bias = torch.empty(1, T, D), torch.empty(D, W), torch.empty(D)
        columns = torch.empty(slots, D, S + W - 2)
        results = [
            torch.ops.gdn.chunk_(*tokens, pool, one, None, bounds),
            torch.ops.gdn.recurrent_(*tokens, pool, one, None, bounds),
            torch.ops.gdn.recurrent_(*tokens, pool, table, count, bounds),
            torch.ops.gdn.causal_conv1d_(x, weight, bias, columns, one, count, bounds),
            *torch.ops.gdn.causal_conv1d(x, weight, bias, None, bounds)[:1],
        ]
        assert all(_is(y.shape[1], T) for y in results)
    assert not env.guards


def _fake_tokens(B, T):
    q, k = torch.empty(B, T, H, K), torch.empty(B, T, H, K)
    v, g, beta = torch.empty(B, T, HV, V), torch.empty(B, T, HV), torch.empty(B, T, HV)
    return q, k, v, g, beta


def test_operators_run_on_inference_tensors():
    with torch.inference_mode():
        tokens, pool = make_inputs(2, 3, H, HV, K, V), make_state(2, HV, V, K)
        before = pool.clone()
        torch.ops.gdn.recurrent_(*tokens, pool)
        torch.ops.gdn.chunk_(*tokens, pool, None)
        x, weight, bias = make_convolution(2, 3, D, W)
        columns = torch.zeros(2, D, W - 1)
        torch.ops.gdn.causal_conv1d_(x, weight, bias, columns)
        assert not torch.equal(pool, before)
        assert torch.equal(columns, x.mT)


@pytest.mark.parametrize("name", ["chunk", "recurrent"])
def test_the_meta_device_computes_shapes_alone(name):
    tokens = make_inputs(2, 3, H, HV, K, V).map(lambda x: x.to("meta"))
    o, final = operator(name)(*tokens)
    assert (o.device.type, o.shape, final.shape) == ("meta", (2, 3, HV, V), (2, HV, V, K))
