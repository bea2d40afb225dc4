"""The kernels of the chunked backward, in Triton's interpreter, against float64 autograd."""

import oracle
import pytest
import torch
from autograd_oracle import _oracle_gradients as oracle_gradients
from autograd_oracle import upstream_of
from inputs import Shape, cu_seqlens, make_inputs, make_state
from tolerance import assert_as_accurate_as_plain, assert_bitwise_equal

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
OPTION_SHAPE = Shape(B=2, T=67, H=2, HV=4, K=16, V=24)


@pytest.fixture(scope="module")
def kernels():
    """Imported late: triton must find the environment that conftest.py sets."""
    from gdn_ops.kernels import chunk_backward

    return chunk_backward


def _tensors(shape, dtype=torch.float32, sequences=None, state_dtype=torch.float32, **options):
    states = make_state(sequences or shape.B, shape.HV, shape.V, shape.K, state_dtype)
    return dict(zip(NAMES, (*make_inputs(*shape, dtype, **options), states), strict=True))


def _gradients(kernels, tensors, bounds=None, **options):
    """What the kernels make of the upstream gradients with which autograd is asked."""
    q, k, v, g, beta, initial_state = tensors.values()
    N = q.shape[0] if bounds is None else bounds.shape[0] - 1
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final_state = torch.empty(N, *v.shape[2:], q.shape[3], dtype=dtype)
    upstream = upstream_of((o, final_state))
    return kernels.chunk_backward(*upstream, q, k, v, g, beta, initial_state, bounds, **options)


def _assert_equals_autograd(kernels, tensors, bounds=None, arithmetic=torch.float32, **options):
    """The plain operator is the oracle's loop in ``arithmetic``, the dtype of the products."""
    exact, plain = (
        oracle_gradients(oracle.delta_rule, tensors.values(), bounds, dtype=dtype, **options)
        for dtype in (torch.float64, arithmetic)
    )
    q, v = tensors["q"], tensors["v"]
    # dq and dk of a key head sum over the channels of the value heads that it serves.
    terms = max(q.shape[3], v.shape[3] * v.shape[2] // q.shape[2])
    actual = _gradients(kernels, tensors, bounds, **options)
    for name, x, gradient, true, rough in zip(
        NAMES, tensors.values(), actual, exact, plain, strict=True
    ):
        if x is None:
            assert gradient.numel() == 0
        else:
            assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype), f"d{name}"
            assert gradient.is_contiguous(), f"d{name}"
            assert_as_accurate_as_plain(gradient, true, rough.float(), terms=terms, name=f"d{name}")


@pytest.mark.parametrize(
    "shape",
    [
        Shape(B=3, T=1, H=2, HV=2, K=32, V=16),
        Shape(B=1, T=63, H=1, HV=2, K=32, V=32),
        Shape(B=2, T=65, H=2, HV=4, K=16, V=24),
        Shape(B=1, T=130, H=1, HV=3, K=24, V=40),
        Shape(B=1, T=70, H=2, HV=2, K=20, V=7),
        Shape(B=1, T=33, H=1, HV=1, K=100, V=70),
        Shape(B=1, T=40, H=1, HV=1, K=256, V=20),
    ],
    ids=str,
)
def test_gradients_equal_autograd_through_the_loop(kernels, shape):
    _assert_equals_autograd(kernels, _tensors(shape))


@pytest.mark.parametrize("missing", ["g", "beta", "initial_state", "all"])
def test_gradients_where_an_argument_is_missing(kernels, missing):
    tensors = _tensors(OPTION_SHAPE)
    for name in ("g", "beta", "initial_state") if missing == "all" else (missing,):
        tensors[name] = None
    _assert_equals_autograd(kernels, tensors)


@pytest.mark.parametrize(
    "options", [{"scale": 0.7}, {"use_qk_l2norm": True}, {"use_qk_l2norm": True, "scale": 2.0}]
)
def test_gradients_with_options(kernels, options):
    tensors = _tensors(OPTION_SHAPE, unit_keys="use_qk_l2norm" not in options)
    _assert_equals_autograd(kernels, tensors, **options)


@pytest.mark.parametrize("use_qk_l2norm", [False, True], ids=["", "l2norm"])
def test_gradients_of_float16_are_as_accurate_as_the_loop_in_float16(kernels, use_qk_l2norm):
    options = {"beta_dtype": torch.float16, "unit_keys": not use_qk_l2norm}
    tensors = _tensors(OPTION_SHAPE, torch.float16, state_dtype=torch.float16, **options)
    half = torch.float16
    _assert_equals_autograd(kernels, tensors, arithmetic=half, use_qk_l2norm=use_qk_l2norm)


@pytest.mark.parametrize(
    ("index_dtype", "use_qk_l2norm"), [(torch.int32, False), (torch.int64, True)], ids=str
)
def test_gradients_of_packed_sequences(kernels, index_dtype, use_qk_l2norm):
    """Empty sequences hand the gradient of their state on; tokens of no sequence have none."""
    lengths = (3, 0, 40, 32, 1, 0)
    shape = OPTION_SHAPE._replace(B=1, T=sum(lengths) + 35)
    tensors = _tensors(shape, sequences=len(lengths))
    bounds = cu_seqlens(lengths, index_dtype)
    _assert_equals_autograd(kernels, tensors, bounds, use_qk_l2norm=use_qk_l2norm)
    for gradient in _gradients(kernels, tensors, bounds)[:5]:
        assert not gradient[:, sum(lengths) :].any()


def test_more_sequences_than_a_program_reads_bounds_at_once(kernels, monkeypatch):
    lengths = (3, 0, 40, 1, 1)
    tensors = _tensors(Shape(1, sum(lengths), 1, 1, 16, 16), sequences=len(lengths))
    expected = _gradients(kernels, tensors, cu_seqlens(lengths))
    monkeypatch.setattr(kernels, "PLACE_BN", 2)
    for x, y in zip(_gradients(kernels, tensors, cu_seqlens(lengths)), expected, strict=True):
        assert_bitwise_equal(x, y)


@pytest.mark.parametrize("g", [-100.0, -1e4, -torch.inf])
def test_gradients_under_strong_decay_are_finite_and_right(kernels, g):
    tensors = _tensors(OPTION_SHAPE)
    tensors["g"][:, 1::2] = g
    if g > -torch.inf:  # autograd through exp(-inf) * state gives NaN
        _assert_equals_autograd(kernels, tensors)
    assert all(gradient.isfinite().all() for gradient in _gradients(kernels, tensors))


def test_gradients_with_beta_of_zero(kernels):
    tensors = _tensors(OPTION_SHAPE)
    tensors["beta"][:, ::3] = 0.0
    _assert_equals_autograd(kernels, tensors)


def test_an_absent_gradient_of_the_final_state_is_zero(kernels):
    tensors = _tensors(OPTION_SHAPE)
    do, zeros = torch.randn_like(tensors["v"]), torch.zeros_like(tensors["initial_state"])
    for name, x, y in zip(
        NAMES,
        kernels.chunk_backward(do, None, *tensors.values()),
        kernels.chunk_backward(do, zeros, *tensors.values()),
        strict=True,
    ):
        assert_bitwise_equal(x, y, f"d{name}")


def test_strided_inputs_give_the_same_bits(kernels):
    tensors = _tensors(OPTION_SHAPE)
    strided = {n: x.movedim(1, -1).contiguous().movedim(-1, 1) for n, x in tensors.items()}
    for name, x, y in zip(
        NAMES, _gradients(kernels, strided), _gradients(kernels, tensors), strict=True
    ):
        assert_bitwise_equal(x, y, f"d{name}")


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_descriptors_give_the_same_bits(kernels, packed, monkeypatch):
    # The interpreter wants rows of gates to start at multiples of 16 bytes.
    lengths = (4, 0, 40, 24)
    shape = OPTION_SHAPE._replace(B=1, T=sum(lengths) + 5) if packed else OPTION_SHAPE
    tensors = _tensors(shape, sequences=len(lengths) if packed else None)
    bounds = cu_seqlens(lengths) if packed else None
    expected = _gradients(kernels, tensors, bounds, use_qk_l2norm=True)
    monkeypatch.setattr(kernels, "_use_descriptors", lambda *_: True)
    monkeypatch.setattr(kernels.triton, "set_allocator", lambda _: None)
    actual = _gradients(kernels, tensors, bounds, use_qk_l2norm=True)
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        assert_bitwise_equal(x, y, f"d{name}")


def test_what_the_kernels_cannot_serve_is_said(kernels):
    q = torch.empty(1, 1, 1, 1)
    served = (q, q, q, q, q)
    assert kernels.supports(*served) is None
    assert "float64" in kernels.supports(q, q, q.double(), q, q)
    assert "key channel" in kernels.supports(*served, q)
