"""A model of transformers means the same with the operators under it.

The exact result is that of the model's own code with all arithmetic in float64, the plain result
that of its own code in the dtype of the model: ours may be off by what tolerance.py derives.
"""

import copy
import os
import re

import pytest
import torch
from tiny_models import (
    CACHES,
    CLASSES,
    HIDDEN,
    exact_arithmetic,
    gdn_layers,
    greedy,
    hugging_face_functions,
    model_of,
    new_cache,
    states,
    tiny_model,
    tiny_model_with_vision,
    tokens,
    wide,
)
from tolerance import assert_as_accurate_as_plain, bound
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening

from gdn_ops.integrations.transformers import causal_conv1d_fn, use_gdn_ops

pytestmark = pytest.mark.usefixtures("no_gradients")
# With GDN_LONG=1 half a thousand, which takes some minutes.
GREEDY_TOKENS = 512 if os.environ.get("GDN_LONG") == "1" else 64
# The further convolution of Qwen4-Exp sees the sequences of a pack as one.
PACKING = [family for family in CLASSES if family != "qwen4_exp"]

of_both_caches = pytest.mark.parametrize("cache", CACHES)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=CLASSES)
def model(request):
    return model_of(request.param)


def _compare(call, model, exact_call=None):
    """``call(model)`` with our operators is as accurate as with the functions of the model code."""
    with exact_arithmetic():
        exact = (exact_call or call)(wide(model))
    with hugging_face_functions():
        plain = call(model)
    with use_gdn_ops(model):
        ours = call(model)
    assert_as_accurate_as_plain(ours, exact, plain, terms=HIDDEN, name="logits")


def _generate(model, ids, count, **options):
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(ids, max_new_tokens=count, **options)[:, ids.shape[1] :]


def _in_pieces(model, ids, lengths, kind):
    """The logits of ``ids``, fed into one cache in pieces of these lengths."""
    cache = new_cache(kind, model)
    pieces = ids.split(lengths, dim=1)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], 1)


@of_both_caches
def test_greedy_tokens_equal_those_of_hugging_face_s_functions(model, cache):
    ids = tokens(2, 40)
    with hugging_face_functions():
        expected = _generate(model, ids, GREEDY_TOKENS)
    with use_gdn_ops(model):
        chosen = _generate(model, ids, GREEDY_TOKENS, cache_implementation=cache)
    assert torch.equal(chosen, expected)
    assert all(len(row.unique()) > 24 for row in chosen), "the text repeats itself: a weak witness"


@of_both_caches
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 16}], ids=["whole", "chunks"])
def test_sampling_draws_the_same_tokens_after_a_prefill_in_one_piece_and_in_chunks(
    model, cache, options
):
    ids = tokens(2, 40)

    def drawn(**more):
        torch.manual_seed(0)
        return _generate(model, ids, 20, do_sample=True, cache_implementation=cache, **more)

    with hugging_face_functions():
        expected = drawn()
    with use_gdn_ops(model):
        assert torch.equal(drawn(**options), expected)


@pytest.mark.parametrize("family", [f for f in CLASSES if f in ("qwen3_5", "qwen3_5_moe")])
def test_logits_after_an_image_are_as_accurate_as_hugging_face_s(family):
    model, call = tiny_model_with_vision(family)
    _compare(lambda m: m(**call).logits, model)


@pytest.mark.parametrize("length", [1, 3, 64, 200])
def test_logits_are_as_accurate_as_hugging_face_s(model, length):
    _compare(lambda m: m(tokens(2, length), use_cache=False).logits, model)


@of_both_caches
@pytest.mark.parametrize("prompt", [1, 2, 70])
def test_prefill_decode_and_a_continuation_of_many_tokens_equal_one_pass(model, cache, prompt):
    lengths = [prompt, 1, 1, 9, 1, 65, 1]
    ids = tokens(2, sum(lengths))
    _compare(
        lambda m: _in_pieces(m, ids, lengths, cache),
        model,
        exact_call=lambda m: m(ids, use_cache=False).logits,
    )


def _padded(lengths):
    """Rows of these lengths without padding, then all of them padded on the left, and the mask."""
    rows = [tokens(1, length, seed=length) for length in lengths]
    width = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    return rows, ids, (ids != 0).long()


def test_left_padding_changes_no_logits(model):
    rows, ids, mask = _padded([70, 33, 1])

    def alone(m):
        return torch.cat([m(row, use_cache=False).logits[0] for row in rows])

    _compare(
        lambda m: m(ids, attention_mask=mask, use_cache=False).logits[mask.bool()],
        model,
        exact_call=alone,
    )


@of_both_caches
def test_left_padding_changes_no_tokens(model, cache):
    rows, ids, mask = _padded([70, 33, 1])
    with hugging_face_functions():
        alone = torch.cat([_generate(model, row, 16) for row in rows])
    with use_gdn_ops(model):
        options = {"attention_mask": mask, "past_key_values": new_cache(cache, model)}
        assert torch.equal(_generate(model, ids, 16, **options), alone)


@pytest.mark.parametrize("family", PACKING)
def test_packed_sequences_do_not_see_each_other(family):
    model = model_of(family)
    rows = [tokens(1, length, seed=length) for length in (40, 1, 3, 1, 65)]
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    packed = collate([{"input_ids": row[0]} for row in rows], return_tensors="pt")
    del packed["labels"]

    def alone(m):
        return torch.cat([m(row, use_cache=False).logits for row in rows], 1)

    with exact_arithmetic():
        exact = alone(wide(model))
    with hugging_face_functions():
        plain = alone(model)
    with use_gdn_ops(model):
        ours = model(**packed, use_cache=False).logits
    assert_as_accurate_as_plain(ours, exact, plain, terms=HIDDEN, name="logits")


def test_packed_sequences_are_refused_without_their_bounds():
    message = "causal_conv1d_fn: cu_seq_lens_q must be given with seq_idx, got None"
    model, ids = tiny_model(), tokens(1, 5)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.int32)
    with use_gdn_ops(model), pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(ids, seq_idx=seq_idx, use_cache=False)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        causal_conv1d_fn(torch.randn(1, 6, 5), torch.randn(6, 4), seq_idx=seq_idx)


class _Results(TorchDispatchMode):
    """Every tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.tensors.append(x)
        return result


@of_both_caches
def test_states_are_v_major(model, cache):
    cache = new_cache(cache, model)
    with use_gdn_ops(model):
        model(tokens(3, 70), past_key_values=cache)
        for _ in range(2):
            assert len(states(cache)) == len(gdn_layers(model)) == 3
            for state in states(cache):
                assert state.shape == (3, 4, model.config.linear_key_head_dim, state.shape[-1])
                assert state.dtype == torch.float32
                assert state.mT.is_contiguous()
            model(tokens(3, 1), past_key_values=cache)


@of_both_caches
def test_states_are_kept_in_the_dtype_that_is_asked_for(model, cache):
    cache, steps = new_cache(cache, model), tokens(3, 74).split([70, 1, 2, 1], 1)
    with use_gdn_ops(model, state_dtype=torch.bfloat16):
        model(steps[0], past_key_values=cache)
        before = [(state, state.data_ptr()) for state in states(cache)]
        for step in steps[1:]:
            logits = model(step, past_key_values=cache).logits
    assert logits.dtype == torch.float32
    for state, (tensor, place) in zip(states(cache), before, strict=True):
        assert state is tensor
        assert (state.dtype, state.data_ptr()) == (torch.bfloat16, place)
        assert state.mT.is_contiguous()


@of_both_caches
@pytest.mark.parametrize("length", [1, 9])
def test_a_step_updates_states_where_they_lie_without_a_second_one(model, cache, length):
    cache = new_cache(cache, model)
    with use_gdn_ops(model):
        model(tokens(3, 70), past_key_values=cache)
        before = [(state, state.data_ptr(), state.clone()) for state in states(cache)]
        with _Results() as results:
            model(tokens(3, length), past_key_values=cache)
    for state, (tensor, place, old) in zip(states(cache), before, strict=True):
        assert state is tensor
        assert state.data_ptr() == place
        assert not torch.equal(state, old)
    places = {place for _, place, _ in before}
    sized = [x for x in results.tensors if x.numel() == before[0][0].numel()]
    assert sized
    assert {x.data_ptr() for x in sized} == places


@of_both_caches
def test_a_cache_may_change_hands_at_any_step(model, cache):
    ids = tokens(2, 40)
    with hugging_face_functions():
        expected = greedy(model, ids, new_cache(cache, model), 24)
    for first, second in (
        (hugging_face_functions, use_gdn_ops),
        (use_gdn_ops, hugging_face_functions),
    ):
        filled = new_cache(cache, model)
        with first():
            start = greedy(model, ids, filled, 8)
        with second():
            middle = greedy(model, start[:, -1:], filled, 8)
        with first():
            end = greedy(model, middle[:, -1:], filled, 8)
        assert torch.equal(torch.cat([start, middle, end], 1), expected)


def test_a_static_cache_that_is_reset_starts_anew(model):
    cache = new_cache("static", model)
    with use_gdn_ops(model):
        first = greedy(model, tokens(2, 40), cache, 5)
        places = [state.data_ptr() for state in states(cache)]
        cache.reset()
        assert torch.equal(greedy(model, tokens(2, 40), cache, 5), first)
        assert [state.data_ptr() for state in states(cache)] == places


@of_both_caches
def test_beam_search_finds_the_same_text(model, cache):
    ids = tokens(2, 20)
    options = {"num_beams": 3, "cache_implementation": cache}
    with hugging_face_functions():
        expected = _generate(model, ids, 30, **options)
    with use_gdn_ops(model):
        assert torch.equal(_generate(model, ids, 30, **options), expected)


@pytest.fixture(scope="module")
def bfloat16_model():
    """A model whose every token sees all experts: rounding cannot send one to another expert."""
    return copy.deepcopy(tiny_model(experts_per_token=4)).bfloat16()


def test_bfloat16_logits_are_as_accurate_as_hugging_face_s(bfloat16_model):
    _compare(lambda m: m(tokens(2, 200), use_cache=False).logits, bfloat16_model)


@of_both_caches
def test_bfloat16_tokens_are_greedy_as_far_as_bfloat16_tells(bfloat16_model, cache):
    model, ids, count = bfloat16_model, tokens(2, 40), 64
    with use_gdn_ops(model):
        text = torch.cat([ids, greedy(model, ids, new_cache(cache, model), count)], 1)
    with exact_arithmetic():
        exact = wide(model)(text[:, :-1], use_cache=False).logits[:, -count:]
    with hugging_face_functions():
        lengths = [ids.shape[1]] + [1] * (count - 1)
        plain = _in_pieces(model, text[:, :-1], lengths, cache)[:, -count:]
    chosen = exact.gather(-1, text[:, -count:, None])
    allowed = 2 * bound(exact, plain, torch.bfloat16, HIDDEN).amax(-1, keepdim=True)
    assert (chosen >= exact.amax(-1, keepdim=True) - allowed).all()
    # Else the law would allow any token.
    assert (allowed < (exact.amax(-1, keepdim=True) - exact.median(-1, keepdim=True).values)).all()
