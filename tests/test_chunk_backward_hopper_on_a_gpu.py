"""Kernels of the backward for Hopper on its GPU: against autograd through the loop over tokens."""

import functools
from unittest import mock

import oracle
import pytest
import torch
from autograd_oracle import assert_gradients, gradients_by_loop, gradients_of
from inputs import cu_seqlens, make_inputs, make_state
from repeats import results_of_repeats
from tolerance import assert_bitwise_equal

import gdn_ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]

H, HV, K, V = 1, 2, 128, 128
BF16, FP32 = torch.bfloat16, torch.float32
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
# Empty sequences first, between and last; then 30 tokens of padding.
LENGTHS, PADDING = (0, 70, 0, 129, 1, 0), 30


@pytest.fixture(autouse=True)
def is_served(cuda):
    """Other GPUs, and other versions of Triton, have the plain kernels alone."""
    from gdn_ops.kernels.chunk_hopper import serves
    from gdn_ops.kernels.configs import gpu_at

    if not serves(K, V, gpu_at(0)):
        pytest.skip("needs sm_90 and the Gluon of a Triton that is known")


def by(form, call):
    """The results of ``call`` by walks of 1 or 2 warp groups, 0: by the plain kernels."""
    from gdn_ops.kernels import chunk_backward, chunk_backward_hopper

    own, launch = chunk_backward_hopper.pick_rows, chunk_backward.launch_gradients

    def pick(_heads, gpu):
        return own(1 if form == 1 else gpu.multiprocessors, gpu)

    rows = mock.Mock(side_effect=pick)
    gradients = mock.Mock(side_effect=launch)
    serves = chunk_backward.serves_backward if form else lambda *_: False
    with (
        mock.patch.object(chunk_backward_hopper, "pick_rows", rows),
        mock.patch.object(chunk_backward, "launch_gradients", gradients),
        mock.patch.object(chunk_backward, "serves_backward", serves),
    ):
        results = call()
    assert rows.called == bool(form)
    return results, gradients.called


def make_batch(B=2, T=200, state=FP32, heads=(H, HV), **options):
    tokens = make_inputs(
        *(B, T, *heads, K, V, BF16),
        device="cuda",
        beta_dtype=BF16,
        unit_keys="use_qk_l2norm" not in options,
    )
    initial = None if state is None else make_state(B, heads[1], V, K, state, device="cuda")
    return [*tokens, initial], options


def make_packed(**options):
    (*tokens, _), options = make_batch(1, sum(LENGTHS) + PADDING, **options)
    initial = make_state(len(LENGTHS), HV, V, K, device="cuda")
    return [*tokens, initial, cu_seqlens(LENGTHS, device="cuda")], options


def make_without(*places, **options):
    args, options = make_batch(**options)
    for place in places:
        args[place] = None
    return args, options


def make_weightless(**options):
    """Tokens here and there that write nothing, and next to nothing."""
    args, options = make_batch(**options)
    args[4][:, ::7] = 0.0
    args[4][0, 3::7] = 2.0**-110
    args[4][1, 3::7, 1] = 2.0**-90
    return args, options


def make_alike(**options):
    """Chunks whose triangular matrices are far from the identity."""
    args, options = make_batch(**options)
    args[1] = args[1][:, :1] + args[1] / 8
    args[3] = args[3] / 64
    return args, options


def make_strong_decays(**options):
    """Sums of decays far beyond what float32 has an exponential of."""
    args, options = make_batch(**options)
    args[3] = torch.where(torch.rand_like(args[3]) < 0.1, -1e4, args[3])
    return args, options


def make_strided(**options):
    """Queries, keys and values as a convolution leaves them."""
    args, options = make_batch(T=130, **options)
    row = torch.cat([x.flatten(2) for x in args[:3]], -1)
    row = row.split([H * K, H * K, HV * V], -1)
    args[:3] = (x.unflatten(-1, (-1, K)) for x in row)
    return args, options


NORMS = {"use_qk_l2norm": True}
CASES = {
    **{f"T={T}": functools.partial(make_batch, T=T) for T in (1, 63, 64, 65, 200)},
    **{f"T={T}, norms": functools.partial(make_batch, T=T, **NORMS) for T in (1, 64, 200)},
    "a value head a key head": lambda: make_batch(heads=(2, 2), **NORMS),
    "four value heads a key head": lambda: make_batch(heads=(1, 4)),
    "keys that are alike": lambda: make_alike(**NORMS),
    "no g": lambda: make_without(3, **NORMS),
    "no beta": lambda: make_without(4, **NORMS),
    "no gates": lambda: make_without(3, 4),
    "no state": lambda: make_without(5),
    "tokens without weight": make_weightless,
    "tokens without weight, norms": lambda: make_weightless(**NORMS),
    "strong decays": lambda: make_strong_decays(**NORMS),
    "strided tokens": lambda: make_strided(**NORMS),
    "scale": lambda: make_batch(T=65, scale=0.5),
    "state bf16": lambda: make_batch(state=BF16),
    "packed": make_packed,
    "packed with norms": lambda: make_packed(**NORMS),
}


def witnesses_of(tensors, bounds, options):
    exact, plain = gradients_by_loop(oracle.delta_rule, tensors, *bounds, **options)
    twin, _ = by(0, lambda: gradients_of(gdn_ops.chunk, tensors, *bounds, **options))
    plain[3] = None if twin[3] is None else twin[3].cpu()
    return exact, plain


def assert_as_accurate_as_the_loop(call, form, exact, plain):
    """But for dg, of which the plain kernels are the witness.

    It has the inner product of two states around a chunk, which either form keeps in 16 bits: a sum
    of 16384 products that may cancel, where the loop has both in float32.
    """
    tensors, bounds, options = call

    def gradients():
        return gradients_of(gdn_ops.chunk, tensors, *bounds, **options)

    actual, has_gradients = by(form, gradients)
    assert has_gradients
    terms = max(K, V * tensors[2].shape[2] // tensors[0].shape[2])
    assert_gradients(actual, exact, plain, NAMES, tensors, terms=terms)


@functools.cache
def expected_of(case):
    args, options = CASES[case]()
    call = (args[:6], args[6:], options)
    return call, *witnesses_of(*call)


@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_as_accurate_as_autograd_through_the_loop(case, form):
    call, *found = expected_of(case)
    assert_as_accurate_as_the_loop(call, form, *found)


@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("has_norms", [False, True], ids=["as given", "norms"])
def test_repeats_have_the_same_bits(has_norms, form):
    args, options = make_batch(3, 300, heads=(2, 4), **(NORMS if has_norms else {}))

    def call():
        return [gradients_of(gdn_ops.chunk, args, **options) for _ in range(50)]

    (first, *others), _ = by(form, call)
    for results in others:
        for x, y in zip(first, results, strict=True):
            assert_bitwise_equal(y, x)


@pytest.mark.parametrize("has_norms", [False, True], ids=["as given", "norms"])
def test_many_chunks_of_a_program_agree_with_the_plain_kernels(has_norms):
    """More chunks of key heads than multiprocessors: a program has several, of three sequences."""
    args, options = make_batch(3, 2000, heads=(4, 8), **(NORMS if has_norms else {}))
    (plain, _), (found, is_hopper) = (
        by(form, lambda: gradients_of(gdn_ops.chunk, args, **options)) for form in (0, 2)
    )
    assert is_hopper
    for x, y in zip(found, plain, strict=True):
        assert (x.float() - y.float()).norm() <= 2**-7 * y.float().norm()


@pytest.mark.parametrize("form", [1, 2])
@pytest.mark.parametrize("has_norms", [False, True], ids=["as given", "norms"])
@pytest.mark.parametrize("rates", [(0.0, 0.1), (0.05, 0.1)], ids=["some forget", "all forget"])
def test_segments_agree_with_whole_sequences(rates, has_norms, form, monkeypatch):
    """Of a head that does not forget a twentieth of the first state is left in the last chunk.

    What heads forget slowly has other roundings in either, which none of them shrinks: the loop is
    the witness of that, below.
    """
    from gdn_ops.kernels import chunk_backward_hopper
    from gdn_ops.kernels.chunk_segments import WHOLE

    args, options = make_batch(2, 9000, **(NORMS if has_norms else {}))
    args[3] = args[3] / 4096 - torch.tensor(rates, device="cuda")
    own = mock.Mock(side_effect=chunk_backward_hopper.pick_split)
    monkeypatch.setattr(chunk_backward_hopper, "pick_split", own)
    found, _ = by(form, lambda: gradients_of(gdn_ops.chunk, args, **options))
    assert own(*own.call_args.args) != WHOLE
    monkeypatch.setattr(chunk_backward_hopper, "pick_split", lambda *_: WHOLE)
    whole, _ = by(form, lambda: gradients_of(gdn_ops.chunk, args, **options))
    for x, y in zip(found, whole, strict=True):
        assert (x.float() - y.float()).norm() <= 2**-12 * y.float().norm()


@pytest.mark.parametrize("form", [1, 2])
def test_segments_that_forget_slowly_are_as_accurate_as_the_loop(form, monkeypatch):
    """A state is forgotten in 14 of the 16 chunks that are looked at, and one segment has more."""
    from gdn_ops.kernels import chunk_backward_hopper, chunk_segments

    monkeypatch.setattr(chunk_segments, "LOOK", 16)
    split = chunk_segments.Split(6, 4, has_maps=False)
    monkeypatch.setattr(chunk_backward_hopper, "pick_split", lambda *_: split)
    args, options = make_batch(1, 1500, **NORMS)
    args[3] = args[3] / 4096 - torch.tensor((0.025, 0.1), device="cuda")
    call = (args, (), options)
    assert_as_accurate_as_the_loop(call, form, *witnesses_of(*call))


@pytest.mark.parametrize("B", [1, 3])
def test_both_walks_beside_each_other_have_the_bits_of_one_after_the_other(B, monkeypatch):
    """Also where two streams have one each, and in a CUDA graph."""
    from gdn_ops.kernels import chunk_backward

    args, options = make_batch(B, 1000, heads=(8, 16), **NORMS)
    do = torch.randn_like(args[2])

    def gradients():
        return chunk_backward.chunk_backward(do, None, *args, **options)

    found = results_of_repeats(gradients)
    pick = chunk_backward.pick_walks

    def in_turn(*sizes):
        walks = pick(*sizes)
        assert walks.of_reverse["launch_pdl"]
        return walks._replace(of_reverse=walks.of_reverse | {"launch_pdl": False})

    monkeypatch.setattr(chunk_backward, "pick_walks", in_turn)
    expected = gradients()
    for results in found:
        for x, y in zip(results, expected, strict=True):
            assert_bitwise_equal(x, y)


def test_the_operator_is_served_by_them_in_eager_mode():
    args, options = make_batch(1, 4200, heads=(2, 4), **NORMS)
    _, has_gradients = by(1, lambda: gradients_of(gdn_ops.chunk, args, **options))
    assert has_gradients
