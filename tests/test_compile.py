"""``torch.compile`` sees one graph for all lengths, and computes what eager computes."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from inputs import cu_seqlens, indices, make_convolution, make_inputs, make_state
from tolerance import assert_bitwise_equal
from torch._dynamo.backends.common import aot_autograd

import gdn_ops

H, HV, K, V, D, W = 2, 4, 8, 6, 12, 4
LENGTHS = (5, 17, 64, 65, 130)


@pytest.fixture(autouse=True)
def empty_compile_cache():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """Backends that run graphs as they are, and count them."""

    def __init__(self):
        self.dynamo, self.forward, self.backward = [], [], []
        self.training = aot_autograd(
            fw_compiler=self._counting(self.forward), bw_compiler=self._counting(self.backward)
        )

    def eager(self, graph, inputs):
        self.dynamo.append(graph)
        return graph.forward

    @staticmethod
    def _counting(graphs):
        def compiler(graph, inputs):
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return compiler


def _assert_all_bitwise_equal(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert_bitwise_equal(x, y)


def _layer(operator):
    """The heart of a layer: convolution, split, delta rule, gate."""

    def layer(x, weight, bias, g, beta, bounds):
        y, _ = gdn_ops.causal_conv1d(x, weight, bias, None, bounds, activation="silu")
        q, k, v = y.split([H * K, H * K, HV * V], -1)
        q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V))
        o, state = operator(q, k, v, g, beta, None, bounds, use_qk_l2norm=True)
        return F.silu(o).flatten(-2), state

    return layer


def _layer_inputs(T, packed):
    B = 1 if packed else 2
    x, weight, bias = make_convolution(B, T, 2 * H * K + HV * V, W)
    _, _, _, g, beta = make_inputs(B, T, H, HV, K, V)
    return x, weight, bias, g, beta, cu_seqlens((T - 4, 0, 3)) if packed else None


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("operator", [gdn_ops.chunk, gdn_ops.recurrent], ids=["chunk", "recurrent"])
def test_a_layer_is_one_graph_for_all_lengths(operator, packed):
    graphs, layer = Graphs(), _layer(operator)
    compiled = torch.compile(layer, backend=graphs.eager, fullgraph=True, dynamic=True)
    for T in LENGTHS:
        inputs = _layer_inputs(T, packed)
        _assert_all_bitwise_equal(compiled(*inputs), layer(*inputs))
    assert len(graphs.dynamo) == 1


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_training_is_one_graph_forward_and_one_backward_for_all_lengths(packed):
    graphs, layer = Graphs(), _layer(gdn_ops.chunk)
    compiled = torch.compile(layer, backend=graphs.training, fullgraph=True, dynamic=True)
    for T in LENGTHS:
        *floats, bounds = _layer_inputs(T, packed)
        gradients = []
        for function in (compiled, layer):
            leaves = [x.clone().requires_grad_() for x in floats]
            o, state = function(*leaves, bounds)
            gradients.append(torch.autograd.grad(o.square().sum() + state.sum(), leaves))
        _assert_all_bitwise_equal(*gradients)
    assert (len(graphs.forward), len(graphs.backward)) == (1, 1)
    called = {node.target for node in graphs.backward[0].graph.nodes}
    assert torch.ops.gdn.chunk_backward.default in called
    assert torch.ops.gdn.causal_conv1d_backward.default in called


def _decode(x, weight, bias, columns, q, k, v, g, beta, pool, slots):
    y = gdn_ops.causal_conv1d_(x, weight, bias, columns, slots, activation="silu")
    o = gdn_ops.recurrent_(q, k, v, g, beta, pool, slots, use_qk_l2norm=True)
    return y * 2, F.silu(o)


def _prefill(x, weight, bias, columns, q, k, v, g, beta, pool, slots):
    y = gdn_ops.causal_conv1d_(x, weight, bias, columns, slots, activation="silu")
    o = gdn_ops.chunk_(q, k, v, g, beta, pool, slots, use_qk_l2norm=True)
    return y * 2, F.silu(o)


def _step_inputs(T, rows):
    x, weight, bias = make_convolution(rows, T, D, W)
    columns = torch.ones(9, D, W - 1)
    tokens, pool = make_inputs(rows, T, H, HV, K, V), make_state(9, HV, V, K)
    slots = indices([4, -1, 2, 7, 0][:rows])
    return [x, weight, bias, columns, *tokens, pool, slots]


def _assert_pools_equal_eager(compiled, step, inputs):
    expected_inputs = [x.clone() for x in inputs]
    before = [x.data_ptr() for x in inputs]
    results, expected = compiled(*inputs), step(*expected_inputs)
    _assert_all_bitwise_equal(results, expected)
    _assert_all_bitwise_equal(inputs, expected_inputs)
    assert [x.data_ptr() for x in inputs] == before


@pytest.mark.parametrize("step", [_decode, _prefill], ids=["decode", "prefill"])
def test_an_update_in_place_is_one_graph_and_updates_the_callers_pool(step):
    graphs = Graphs()
    compiled = torch.compile(step, backend=graphs.training, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for T, rows in ((17, 5), (2, 3), (5, 2), (64, 4), (65, 3)):
            _assert_pools_equal_eager(compiled, step, _step_inputs(T, rows))
    assert len(graphs.forward) == 1


def test_inductor_updates_the_callers_pool_too():
    """Inductor must find that the pool, functional for a while, is to be written in place."""
    compiled = torch.compile(_decode, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (5, 3):
            inputs = _step_inputs(2, rows)
            expected_inputs = [x.clone() for x in inputs]
            results, expected = compiled(*inputs), _decode(*expected_inputs)
            _assert_all_bitwise_equal(inputs, expected_inputs)
            for x, y in zip(results, expected, strict=True):
                torch.testing.assert_close(x, y)  # silu is Inductor's own


def test_a_verify_loop_compiles_once():
    """Accepted counts are data: they change from step to step and no graph is made anew."""
    graphs = Graphs()
    compiled = torch.compile(gdn_ops.recurrent_, backend=graphs.eager, fullgraph=True, dynamic=True)
    S, rows = 3, 2
    pool = make_state(rows * S, HV, V, K)
    table, expected_pool = indices([[0, 1, 2], [3, 4, 5]]), pool.clone()
    for accepted in ([1, 1], [3, 2], [1, 3], [2, 9]):
        call = (*make_inputs(rows, S, H, HV, K, V), pool, table, indices(accepted))
        expected = gdn_ops.recurrent_(*call[:5], expected_pool, *call[6:])
        assert_bitwise_equal(compiled(*call), expected)
        assert_bitwise_equal(pool, expected_pool)
    assert len(graphs.dynamo) == 1


def test_a_function_of_one_step_exports_with_symbolic_sizes():
    class Step(torch.nn.Module):
        def forward(self, q, k, v, g, beta):
            return gdn_ops.chunk(q, k, v, g, beta, use_qk_l2norm=True)

    tokens = make_inputs(2, 7, H, HV, K, V)
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    exported = torch.export.export(Step(), tuple(tokens), dynamic_shapes=(sizes,) * 5)
    other = make_inputs(3, 70, H, HV, K, V)
    _assert_all_bitwise_equal(exported.module()(*other), Step()(*other))
