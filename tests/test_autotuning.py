"""What ``max_autotune`` times: a short list, and on small scratch instead of the caller's pools."""

import functools
from unittest import mock

import pytest
import torch
from inputs import cu_seqlens, indices, make_convolution, make_inputs, make_state

import gdn_ops
from lowering import _inductor
from lowering.fake_gpu import generate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

H, HV, K, V, D, W = 2, 4, 64, 64, 64, 4
SLOTS = 4096


def _step(*options, B=3, T=1):
    return gdn_ops.recurrent_, (*_tokens(B, T), make_state(SLOTS, HV, V, K), *options)


def _tokens(B, T):
    return make_inputs(B, T, H, HV, K, V, torch.bfloat16)


def _convolution(B, T, *options):
    return (*make_convolution(B, T, D, W, torch.bfloat16), *options)


def _columns(slots):
    return torch.zeros(slots, D, W - 1, dtype=torch.bfloat16)


def _doubled_chunk_(*args):
    """With something to fuse: stored by a descriptor, a scan of few heads has one form."""
    return gdn_ops.chunk_(*args) * 2


TABLE = torch.arange(12, dtype=torch.int32).view(3, 4)
# Each with the slots that its rows read: one for all by index, else one each.
CALLS = {
    "recurrent_": (lambda: _step(indices([3, 1, -1])), 1),
    "recurrent_ of every row": (_step, 3),
    "recurrent_ by table": (lambda: _step(TABLE, indices([1, 4, 2]), T=4), 1),
    "recurrent_ packed": (lambda: _step(None, None, cu_seqlens([5, 0, 9]), B=1, T=20), 3),
    "recurrent packed": (
        lambda: (
            gdn_ops.recurrent,
            (*_tokens(1, 20), make_state(3, HV, V, K), cu_seqlens([5, 0, 9])),
        ),
        3,
    ),
    "chunk_": (
        lambda: (
            _doubled_chunk_,
            (*_tokens(2, 70), make_state(SLOTS, HV, V, K), indices([3, 1])),
        ),
        1,
    ),
    "causal_conv1d_": (
        lambda: (
            gdn_ops.causal_conv1d_,
            _convolution(3, 1, _columns(SLOTS), indices([3, 1, -1])),
        ),
        1,
    ),
    "causal_conv1d packed": (
        lambda: (
            gdn_ops.causal_conv1d,
            _convolution(1, 20, _columns(3), cu_seqlens([5, 0, 9])),
        ),
        3,
    ),
}


def _selections(call, **options):
    """For each template of a call: its choices, its inputs, and what they would be timed on."""
    function, args = call()
    seen = []

    def select(name, choices, inputs, layout, input_gen_fns=None, **_):
        with _inductor._OnCpu():
            scratch = {i: make(inputs[i]) for i, make in (input_gen_fns or {}).items()}
        seen.append(([choice.description for choice in choices], inputs, scratch))
        return choices[0].output_node()

    with mock.patch.object(_inductor, "autotune_select_algorithm", select):
        (module,) = generate(functools.partial(function), args, options=options)
    assert ".default(" not in module.code, "an opaque call"
    return seen


@pytest.mark.parametrize("call", CALLS)
def test_one_choice_is_made_without_timing_and_a_few_are_timed_on_request(call):
    plain, timed = (
        [choices for choices, *_ in _selections(CALLS[call][0], **options)]
        for options in ({}, {"max_autotune": True})
    )
    assert all(len(choices) == 1 for choices in plain)
    assert 1 < len(timed[-1]) <= 5
    assert [choices[0] for choices in timed] == [choices[0] for choices in plain]


@pytest.mark.parametrize("call", CALLS)
def test_a_pool_is_timed_as_scratch_of_the_slots_that_are_read(call):
    """Not of the size of the pool, and not of fewer slots than a kernel reaches."""
    make, slots = CALLS[call]
    *_, (_, inputs, scratch) = _selections(make, max_autotune=True)
    (place,) = [i for i, x in scratch.items() if x.is_floating_point()]
    pool, state = inputs[place], scratch.pop(place)
    assert state.shape == (slots, *pool.get_size()[1:])
    assert state.stride() == tuple(pool.get_stride())
    assert state.dtype == pool.get_dtype()
    for i, x in scratch.items():
        assert (x.shape, x.dtype) == (tuple(inputs[i].get_size()), inputs[i].get_dtype())
