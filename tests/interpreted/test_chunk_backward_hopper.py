"""The backward's kernels in Gluon, run on a CPU, against float64 autograd."""

import functools

import oracle
import pytest
import torch
from autograd_oracle import assert_gradients, gradients_by_loop, upstream_of
from gluon_interpreter import interpreted
from inputs import cu_seqlens, make_inputs, make_state

pytest.importorskip("triton")

K, V, BF16 = 128, 128, torch.bfloat16
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
LENGTHS, PADDING = (0, 70, 64, 0, 1), 9


@pytest.fixture(scope="module")
def kernels():
    """Imported late: triton must find the environment that conftest.py sets."""
    from gdn_ops.kernels import chunk_backward
    from gdn_ops.kernels.chunk_hopper import has_gluon

    if not has_gluon():
        pytest.skip("needs the Gluon of a Triton that is known")
    return chunk_backward


def _gradients(kernels, tensors, bounds, walks, monkeypatch, split=None, **options):
    """By the kernels in Gluon, with 1 or 2 groups that walk; one program has all gradients."""
    from gdn_ops.kernels import (
        chunk_backward_gates,
        chunk_backward_gradients_hopper,
        chunk_backward_gradients_products,
        chunk_backward_gradients_roles,
        chunk_backward_hopper,
        chunk_backward_replay_hopper,
        chunk_backward_reverse_hopper,
        chunk_backward_reverse_walk,
        chunk_backward_walk,
        chunk_forget_hopper,
    )
    from gdn_ops.kernels.chunk_segments import WHOLE
    from gdn_ops.kernels.configs import Gpu

    modules = (
        *(chunk_backward_gates, chunk_backward_replay_hopper, chunk_backward_reverse_hopper),
        *(chunk_backward_reverse_walk, chunk_backward_walk, chunk_backward_gradients_hopper),
        *(chunk_backward_gradients_products, chunk_backward_gradients_roles, chunk_forget_hopper),
    )
    q, k, v, g, beta, initial_state = tensors
    N = q.shape[0] if bounds is None else bounds.shape[0] - 1
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    do, dfinal_state = upstream_of((v, torch.empty(N, *v.shape[2:], q.shape[3], dtype=dtype)))
    own = chunk_backward_hopper.pick_rows
    heads, gpu = 1 if walks == 1 else 1000, Gpu("interpreter", 2, False)
    monkeypatch.setattr(chunk_backward_hopper, "pick_rows", lambda *_: own(heads, gpu))
    monkeypatch.setattr(chunk_backward_hopper, "pick_split", lambda *_: split or WHOLE)
    monkeypatch.setattr(kernels, "serves_backward", lambda *_: True)
    monkeypatch.setattr(kernels, "_use_descriptors", lambda *_: True)
    monkeypatch.setattr(kernels.chunk, "_gpu_at", lambda _: Gpu("interpreter", 1, False))
    with interpreted(modules, monkeypatch) as launchers:
        found = kernels.chunk_backward(
            *(do, dfinal_state, q, k, v, g, beta, initial_state, bounds), **options
        )
    assert {name: launcher.calls for name, launcher in launchers.items()} == {
        "replay_hopper_kernel": 1,
        "reverse_hopper_kernel": 1,
        "gradients_hopper_kernel": 1,
    }
    return [None if x is None else y for x, y in zip(tensors, found, strict=True)]


def _batch(B=1, T=130, H=1, HV=2, without=(), **options):
    tokens = make_inputs(B, T, H, HV, K, V, BF16, beta_dtype=BF16, unit_keys=not options)
    tensors = [*tokens, make_state(B, HV, V, K)]
    for place in without:
        tensors[place] = None
    return tensors, None, options


def _weightless(**options):
    tensors, _, options = _batch(**options)
    tensors[4][:, ::5] = 0.0
    tensors[4][:, 2::5] = 2.0**-110
    return tensors, None, options


def _packed(**options):
    (*tokens, _), _, options = _batch(T=sum(LENGTHS) + PADDING, **options)
    return [*tokens, make_state(len(LENGTHS), 2, V, K)], cu_seqlens(LENGTHS), options


NORMS = {"use_qk_l2norm": True}
CASES = {
    "a token": lambda: _batch(B=3, T=1, HV=4),
    "chunks": lambda: _batch(T=128, **NORMS),
    "a batch": lambda: _batch(B=2, H=2, T=70),
    "norms": lambda: _batch(**NORMS),
    "four value heads a key head": lambda: _batch(HV=4, T=65),
    "no gates": lambda: _batch(without=(3, 4, 5)),
    "tokens without weight": lambda: _weightless(**NORMS),
    "scale": lambda: _batch(T=65, scale=0.5),
    "packed": _packed,
    "packed with norms": lambda: _packed(**NORMS),
}


@functools.cache
def _expected_of(case):
    tensors, bounds, options = CASES[case]()
    bound = () if bounds is None else (bounds,)
    return (
        tensors,
        bounds,
        options,
        *gradients_by_loop(oracle.delta_rule, tensors, *bound, **options),
    )


@pytest.mark.parametrize("walks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_as_accurate_as_autograd_through_the_loop(kernels, case, walks, monkeypatch):
    """But for dg, of which the plain kernels are the witness: their states have 16 bits too."""
    tensors, bounds, options, exact, plain = _expected_of(case)
    if bounds is not None:
        # What is beside a sequence never leaks, and may be no number.
        tensors = [x.clone() for x in tensors]
        for x in tensors[:3]:
            x[:, sum(LENGTHS) :] = torch.nan
    actual = _gradients(kernels, tensors, bounds, walks, monkeypatch, **options)
    monkeypatch.undo()
    if tensors[3] is not None:
        plain = [*plain[:3], _plain_dg(kernels, tensors, bounds, options), *plain[4:]]
    terms = max(K, V * tensors[2].shape[2] // tensors[0].shape[2])
    assert_gradients(actual, exact, plain, NAMES, tensors, terms=terms)


def _plain_dg(kernels, tensors, bounds, options):
    q, v, initial_state = tensors[0], tensors[2], tensors[5]
    N = q.shape[0] if bounds is None else bounds.shape[0] - 1
    states = torch.empty(N, *v.shape[2:], q.shape[3], dtype=initial_state.dtype)
    return kernels.chunk_backward(*upstream_of((v, states)), *tensors, bounds, **options)[3]


@pytest.mark.parametrize("walks", [1, 2])
@pytest.mark.parametrize("rates", [(0.0, 0.2), (0.3, 0.2)], ids=["some forget", "all forget"])
@pytest.mark.parametrize("T", [650, 704])
def test_segments_agree_with_whole_sequences(T, rates, walks, kernels, monkeypatch):
    """Of chunks that are read for a state alone nothing is written, and of the others all."""
    from gdn_ops.kernels import chunk_segments

    monkeypatch.setattr(chunk_segments, "LOOK", 4)
    tensors, _, options = _batch(B=2, T=T, **NORMS)
    tensors[3].mul_(1 / 64).sub_(torch.tensor(rates))
    whole = _gradients(kernels, tensors, None, walks, monkeypatch, **options)
    split = chunk_segments.Split(4, 1, has_maps=False)
    found = _gradients(kernels, tensors, None, walks, monkeypatch, split, **options)
    for x, y in zip(found, whole, strict=True):
        assert (x.float() - y.float()).norm() <= 2**-12 * y.float().norm()


def test_gradients_of_segments_do_not_read_what_is_forgotten(kernels, monkeypatch):
    from gdn_ops.kernels import chunk_segments

    monkeypatch.setattr(chunk_segments, "LOOK", 4)
    tensors, _, options = _batch(T=704, **NORMS)
    tensors[3].sub_(0.3)
    tensors[2][:, 3] = torch.nan
    split = chunk_segments.Split(2, 1, has_maps=False)
    _, dk, dv, *_ = _gradients(kernels, tensors, None, 1, monkeypatch, split, **options)
    whole = _gradients(kernels, tensors, None, 1, monkeypatch, **options)[1]
    assert dv.isfinite().all()
    assert dk[:, 384:].isfinite().all()
    assert whole[:, 384:].isnan().any()
