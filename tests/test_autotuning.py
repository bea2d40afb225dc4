"""What ``max_autotune`` times: a short list, and on small scratch instead of the caller's pools."""

import functools
from unittest import mock

import pytest
import torch
from inputs import cu_seqlens, indices, make_convolution, make_inputs, make_state

import gdn_ops
from lowering import _inductor, fake_gpu
from lowering.fake_gpu import generate

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU"),
    # Inductor asks for a storage so, where it makes what it times choices on.
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

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


def _doubled_chunk(*args):
    o, final_state = gdn_ops.chunk(*args)
    return o * 2, final_state


def _chunk_of_one_state(q, k, v, g, beta, state):
    return _doubled_chunk(q, k, v, g, beta, state.expand(len(q), -1, -1, -1))


def _gated_step_(q, k, v, projected, rate, bias, pool):
    """With gates that the kernel computes, of the halves of one projection."""
    a, b = projected.chunk(2, -1)
    g, beta = gdn_ops.gdn_gate(a, rate, bias), b.sigmoid()
    return gdn_ops.recurrent_(q, k, v, g, beta, pool)


TABLE = torch.arange(12, dtype=torch.int32).view(3, 4)
# Each with the slots that its rows read: one for all by index, else one each.
CALLS = {
    "recurrent_": (lambda: _step(indices([3, 1, -1])), 1),
    "recurrent_ by a column": (lambda: _step(TABLE[:, 0]), 1),
    "recurrent_ of every row": (_step, 3),
    "recurrent_ with gates": (
        lambda: (
            _gated_step_,
            (
                *_tokens(3, 1)[:3],
                torch.randn(3, 1, 2 * HV, dtype=torch.bfloat16),
                *torch.rand(2, HV),
                make_state(SLOTS, HV, V, K),
            ),
        ),
        3,
    ),
    "recurrent_ by table": (lambda: _step(TABLE, indices([1, 4, 2]), T=4), 1),
    # Of few tokens a row: more have a kernel of their own, and one choice.
    "recurrent_ packed": (lambda: _step(None, None, cu_seqlens([3, 0, 2]), B=1, T=6), 3),
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
    "chunk_ of every row": (
        lambda: (_doubled_chunk_, (*_tokens(2, 70), make_state(SLOTS, HV, V, K), None)),
        2,
    ),
    "chunk": (lambda: (_doubled_chunk, (*_tokens(2, 70), make_state(2, HV, V, K))), 2),
    "chunk of one state": (
        lambda: (_chunk_of_one_state, (*_tokens(2, 70), make_state(1, HV, V, K))),
        2,
    ),
    "chunk packed": (
        lambda: (
            _doubled_chunk,
            (*_tokens(1, 70), make_state(3, HV, V, K), cu_seqlens([30, 0, 40])),
        ),
        3,
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
    from torch._inductor.select_algorithm import AlgorithmSelectorCache  # noqa: TID251

    function, args = call()
    seen = []

    def select(name, choices, inputs, layout, input_gen_fns=None, **_):
        assert len({x.get_name() for x in inputs}) == len(inputs)
        with fake_gpu._OnCpu():
            timed = AlgorithmSelectorCache.get_inputs(choices, inputs, layout, input_gen_fns)
        scratch = timed.triton.input_tensors
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
def test_states_are_timed_as_scratch_of_the_slots_that_are_reached(call):
    """Not of the size of the pool, and not of fewer slots than a kernel reads or writes."""
    make, slots = CALLS[call]
    *_, (_, inputs, scratch) = _selections(make, max_autotune=True)
    states = 0
    for x, timed in zip(inputs, scratch, strict=True):
        first, *rest = x.get_size()
        if rest in ([HV, V, K], [D, W - 1]):
            first, states = slots, states + 1
        assert timed.shape == (first, *rest)
        assert timed.stride() == tuple(x.get_stride())
        assert timed.dtype == x.get_dtype()
    # What is not updated in place is read in one tensor and written to another.
    operator = make()[0].__name__
    assert states == (1 if operator.endswith("_") else 2)


@pytest.mark.parametrize(("layer", "first_slot"), [(1, 0), (0, 1)], ids=["pool", "slots"])
def test_what_lies_at_an_offset_is_not_timed(layer, first_slot):
    """A kernel adds the offset itself, and would read and write past the end of scratch."""

    def step(q, k, v, g, beta, pools, slots):
        return gdn_ops.recurrent_(q, k, v, g, beta, pools[layer], slots[first_slot:])

    pools = make_state(2 * 9, HV, V, K).view(2, 9, HV, V, K)
    slots = indices([3, 1, 2, 4][: 3 + first_slot])
    args = (*_tokens(3, 1), pools, slots)
    ((choices, *_),) = _selections(lambda: (step, args), max_autotune=True)
    assert len(choices) == 1
