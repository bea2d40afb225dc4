"""``SpeculativeDecoder``: the text of plain decoding for every row, whoever drafts."""

import copy
import functools
import json.decoder
import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import transformers
from tiny_models import VOCABULARY, tiny_model, tokens
from torch._dynamo.utils import counters

from gdn_ops.integrations.transformers import use_gdn_ops
from gdn_ops.speculative import DraftModel, PromptLookup, Proposer, SpeculativeDecoder

CHECKPOINT = Path(__file__).parent.parent / "examples" / "model"
NEW = 60


@functools.cache
def trained_model():
    transformers.logging.disable_progress_bar()
    return transformers.Qwen3NextForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@functools.cache
def prompts():
    """Pieces of a file that the checkpoint was not trained on, of very different lengths."""
    text = torch.tensor(list(Path(json.decoder.__file__).read_bytes()))
    return [
        text[start : start + n] for start, n in ((0, 200), (300, 3), (900, 70), (50, 1), (7, 9))
    ]


@functools.cache
def plain_texts():
    """What ``generate`` makes of each prompt alone."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    with use_gdn_ops(trained_model()):
        return [
            trained_model().generate(p[None], attention_mask=torch.ones_like(p[None]), **options)[0]
            for p in prompts()
        ]


def disturbed(model, strength):
    """The same model with noise in its weights: a draft that is right sometimes."""
    draft = copy.deepcopy(model)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(strength * p.std() * torch.randn(p.shape, generator=source))
    return draft


def decoder_of(model, rows, proposer=None, drafted=4, length=300, **options):
    return SpeculativeDecoder(
        model, rows, length, drafted, proposer, compile_options=None, **options
    )


def assert_same_texts(texts, expected):
    assert [x.tolist() for x in texts] == [x.tolist() for x in expected]


class NothingAndNonsense(Proposer):
    """Drafts a wrong number of random tokens, and none in every other row."""

    def prepare(self, model, batch_size, length, num_draft_tokens, state_dtype):
        self.count = num_draft_tokens

    def propose(self, tokens, lengths, accepted):
        drafts = torch.randint(VOCABULARY, (len(lengths), self.count))
        return drafts, torch.arange(len(lengths)) % 2 * torch.randint(self.count + 1, lengths.shape)


PROPOSERS = {
    "prompt lookup": PromptLookup,
    "hybrid draft": lambda: DraftModel(disturbed(trained_model(), 0.03)),
    "nonsense": NothingAndNonsense,
}


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_every_row_has_the_text_of_plain_greedy_decoding(proposer, rows):
    """Rows keep unequal numbers of tokens; with two of them, one that ends takes a new prompt."""
    with decoder_of(trained_model(), rows, PROPOSERS[proposer]()) as decoder:
        assert_same_texts(decoder.generate(prompts(), NEW), plain_texts())


def test_hundreds_of_tokens_of_a_row_are_those_of_decoding_without_drafts():
    model, prompt = trained_model(), prompts()[0]
    with decoder_of(model, 1, length=800) as decoder:
        (text,) = decoder.generate([prompt], 600)
    with decoder_of(model, 1, length=800, drafted=0) as decoder:
        (expected,) = decoder.generate([prompt], 600)
    assert torch.equal(text[: len(plain_texts()[0])], plain_texts()[0])
    assert torch.equal(text, expected)


def test_a_row_does_not_depend_on_its_neighbours():
    """They start, go on, end and start again around it."""
    others, (prompt, *_) = prompts()[1:], prompts()
    with decoder_of(trained_model(), 3) as decoder:
        decoder.prefill(1, prompt, NEW)
        for i in range(200):
            if not decoder.active[1]:
                break
            if i % 3 == 0:
                decoder.prefill(i % 2 * 2, others[i % len(others)], 1 + i % 17)
            decoder.step()
        assert_same_texts([decoder.text(1)], plain_texts()[:1])


def test_rows_keep_unequal_numbers_of_tokens_in_one_step():
    with decoder_of(trained_model(), 5) as decoder:
        for row, prompt in enumerate(prompts()):
            decoder.prefill(row, prompt)
        seen = set()
        for _ in range(20):
            before = decoder.lengths.clone()
            decoder.step()
            seen.add(tuple((decoder.lengths - before).tolist()))
    assert any(len(set(kept)) > 2 for kept in seen)


@pytest.mark.parametrize("drafted", [1, 3])
def test_a_perfect_draft_is_kept_whole(drafted):
    """So its states, which go back over what was drawn and on by what was kept, are right."""
    model = trained_model()
    with decoder_of(model, 3, DraftModel(model), drafted) as decoder:
        for row, prompt in enumerate(prompts()[:3]):
            decoder.prefill(row, prompt)
        for _ in range(15):
            before = decoder.lengths.clone()
            decoder.step()
            assert (decoder.lengths - before).tolist() == [1 + drafted] * 3


def test_a_draft_model_without_a_recurrent_state_serves():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    draft = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads)
    ).eval()
    with decoder_of(trained_model(), 2, DraftModel(draft), 2) as decoder:
        assert_same_texts(decoder.generate(prompts()[:2], NEW), plain_texts()[:2])


def test_a_text_ends_where_it_must():
    """With the first end token, even in the middle of kept drafts, or at its length."""
    prompt, plain = prompts()[0], plain_texts()[0]
    for new in (1, 2, 7, 30):
        end = int(plain[len(prompt) + new - 1])
        first = int((plain[len(prompt) :] == end).nonzero()[0]) + 1
        with decoder_of(trained_model(), 1, eos_token_id=[end, 0]) as decoder:
            assert_same_texts(decoder.generate([prompt]), [plain[: len(prompt) + first]])
        with decoder_of(trained_model(), 1, length=len(prompt) + new) as decoder:
            assert_same_texts(decoder.generate([prompt]), [plain[: len(prompt) + new]])
            assert not decoder.active.any()


def test_states_may_be_kept_in_bfloat16():
    with decoder_of(trained_model(), 1, state_dtype=torch.bfloat16) as decoder:
        decoder.generate(prompts()[:1], 5)
        layers = [x.slots for x in decoder._runner.cache.layers if hasattr(x, "slots")]
        assert {states._state.dtype for states in layers} == {torch.bfloat16}


def test_exact_steps_leave_16_bit_states_as_decoding_without_drafts_does():
    """So the texts agree too, although each state is rounded after each of a hundred tokens."""
    model, texts = trained_model(), []
    for drafted in (0, 4):
        options = {"drafted": drafted, "state_dtype": torch.bfloat16, "exact": True}
        with decoder_of(model, 2, **options) as decoder:
            texts.append(decoder.generate(prompts()[:2], 100))
    assert_same_texts(*texts)


def uncertain_place(probabilities, text):
    """How many tokens of a text stand before one that the model and prompt lookup half expect."""
    for T in range(40, len(text)):
        likely, (draft, *_) = probabilities[T - 1], looked_up(text[:T], 3, 1) or [0]
        if 0.2 < likely[draft] < 0.8 and likely.max() < 0.8:
            return T
    raise AssertionError("the text has no such place")


def pools_of(decoder):
    """The tensors that a step changes, but for keys and values, which are written over."""
    runners = [decoder._runner, getattr(decoder._proposer, "_runner", None)]
    pools = [decoder.tokens, decoder.lengths]
    for runner in filter(None, runners):
        pools.append(runner.rows.accepted)
        for layer in runner.cache.layers:
            pools += [x for x in vars(getattr(layer, "slots", object)).values() if is_tensor(x)]
    return pools


def is_tensor(x):
    return isinstance(x, torch.Tensor)


@pytest.mark.parametrize("proposer", ["prompt lookup", "hybrid draft"])
def test_sampling_keeps_the_distribution(proposer):
    """Pairs of tokens after a text, in three classes each, from rows that draw apart.

    By the inequality of Bretagnolle, Huber and Carol the total variation between n draws and their
    distribution over c cells passes sqrt((c ln 2 + ln 1/p) / 2n) with probability p at most.
    """
    model, rows, rounds, cells, p = trained_model(), 32, 30, 9, 1e-6
    n = rows * rounds
    with torch.no_grad(), use_gdn_ops(model):
        probabilities = model(prompts()[0][None]).logits[0].softmax(-1)
        T = uncertain_place(probabilities, prompts()[0].tolist())
        text, first = prompts()[0][:T], probabilities[T - 1]
        every = torch.cat([text.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], 1)
        second = model(every, logits_to_keep=1).logits[:, -1].softmax(-1)
    kind = torch.full((VOCABULARY,), 2)
    kind[first.topk(2).indices] = torch.arange(2)
    member = torch.nn.functional.one_hot(kind).float()
    expected = member.T @ (first[:, None] * (second @ member))
    torch.manual_seed(0)
    counts, kept = torch.zeros(3, 3), []
    with decoder_of(model, rows, PROPOSERS[proposer](), 2, 250, temperature=1.0) as decoder:
        for row in range(rows):
            decoder.prefill(row, text[:-1])
        decoder.tokens[:, T - 1] = text[-1]  # whatever was drawn there
        pools = pools_of(decoder)
        start = [x.clone() for x in pools]
        for _ in range(rounds):
            for pool, value in zip(pools, start, strict=True):
                pool.copy_(value)
            decoder.step()
            kept += (decoder.lengths - T).tolist()
            decoder.step()
            first_kind, second_kind = kind[decoder.tokens[:, T : T + 2]].unbind(1)
            counts.index_put_((first_kind, second_kind), torch.ones(rows), accumulate=True)
    assert 0.1 < sum(k > 1 for k in kept) / n < 0.9
    bound = math.sqrt((cells * math.log(2) + math.log(1 / p)) / (2 * n))
    assert (counts / n - expected).abs().sum() / 2 < bound
    assert (1 / cells - expected).abs().sum() / 2 > bound  # the law tells the two apart


def test_one_graph_serves_every_step_and_one_every_prompt():
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(layers=2, experts=0)
    options = {"compile_options": {"backend": "eager"}, "compile_prefill": True}
    with SpeculativeDecoder(model, 2, 100, 3, **options) as decoder:
        texts = decoder.generate([tokens(1, n)[0] for n in (9, 40, 23)], 12)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    with decoder_of(model, 2, drafted=3, length=100) as decoder:
        eager = decoder.generate([tokens(1, n)[0] for n in (9, 40, 23)], 12)
    assert_same_texts(texts, eager)


def looked_up(text, max_ngram, count):
    """Prompt lookup as one would say it."""
    for size in range(min(max_ngram, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                period = len(text) - end
                return [text[end + i % period] for i in range(count)]
    return []


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_prompt_lookup_finds_the_longest_and_latest_run(texts, max_ngram):
    """Whatever stands past the end of a text."""
    proposer = PromptLookup(max_ngram)
    proposer.prepare(None, len(texts), 16, 3, torch.float32)
    buffer = torch.randint(3, (len(texts), 16))
    for row, text in enumerate(texts):
        buffer[row, : len(text)] = torch.tensor(text)
    lengths = torch.tensor([len(text) for text in texts])
    drafts, counts = proposer.propose(buffer, lengths, torch.ones(len(texts), dtype=torch.int32))
    for text, draft, count in zip(texts, drafts.tolist(), counts.tolist(), strict=True):
        assert draft[:count] == looked_up(text, max_ngram, 3)


def test_model_code_is_restored():
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    before = modeling.causal_conv1d_fn
    model = tiny_model(layers=2, experts=0)
    with decoder_of(model, 1, DraftModel(model), 1) as decoder:
        assert modeling.causal_conv1d_fn is not before
        decoder.close()
    assert modeling.causal_conv1d_fn is before
    with pytest.raises(ValueError, match="vocabulary"):
        other_vocabulary(model)
    assert modeling.causal_conv1d_fn is before


def other_vocabulary(model):
    draft = copy.deepcopy(model)
    draft.config.vocab_size = 300
    decoder_of(model, 1, DraftModel(draft))


def of_attention(model):
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    decoder_of(transformers.LlamaForCausalLM(config), 1)


def with_other_attention(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    decoder_of(model, 1)


def prefill(*args):
    def call(model):
        with decoder_of(model, 2, length=9) as decoder:
            decoder.prefill(*args)

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: decoder_of(m, 0), "batch_size must be at least 1, got 0"),
        (lambda m: decoder_of(m, 1, length=1), "max_length must be at least 2, got 1"),
        (lambda m: decoder_of(m, 1, drafted=-1), "num_draft_tokens must be at least 0, got -1"),
        (lambda m: decoder_of(m, 1, temperature=-1), "temperature must be at least 0, got -1"),
        (lambda m: decoder_of(m, 1, state_dtype=torch.int8), "state_dtype must be float32, bfl"),
        (of_attention, "model must have gated delta net layers, got LlamaForCausalLM"),
        (with_other_attention, "model must have attn_implementation 'sdpa', got 'eager'"),
        (other_vocabulary, "vocab_size = 256, got 300"),
        (lambda m: PromptLookup(0), "PromptLookup: max_ngram must be at least 1, got 0"),
        (prefill(2, tokens(1, 3)[0]), "prefill: row must be less than batch_size = 2, got 2"),
        (prefill(0, tokens(1, 3)), r"1 <= T < max_length = 9, got \[1, 3\]"),
        (prefill(0, tokens(1, 9)[0]), r"1 <= T < max_length = 9, got \[9\]"),
        (prefill(0, tokens(1, 3)[0], 0), "prefill: max_new_tokens must be at least 1, got 0"),
    ],
)
def test_what_breaks_a_rule_is_refused(call, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        call(tiny_model(layers=2, experts=0))
