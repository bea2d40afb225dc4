"""``generate`` with drafted tokens on hybrid models: lossless, whoever drafts and how much."""

import copy
import functools
import json.decoder
import math
import os
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import VOCABULARY, tiny_model, tokens

from gdn_ops.integrations.transformers import use_gdn_ops
from gdn_ops.integrations.transformers.assisted_cache import SlotLayer

# With GDN_LONG=1 some thousands, which takes a minute or two.
GREEDY_TOKENS = 3000 if os.environ.get("GDN_LONG") == "1" else 1000
CHECKPOINT = Path(__file__).parent.parent / "examples" / "model"


@functools.cache
def trained_model():
    """The checkpoint of the examples, whose greedy text is not one word again and again."""
    transformers.logging.disable_progress_bar()
    return transformers.Qwen3NextForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def source_text(length):
    """Bytes of a file that the checkpoint was not trained on, ``[1, length]``."""
    text = Path(json.decoder.__file__).read_bytes()
    return torch.tensor([list(text[:length])])


def disturbed(model, strength):
    """The same model with noise in its weights: a draft that is right sometimes."""
    draft = copy.deepcopy(model)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(strength * p.std() * torch.randn(p.shape, generator=source))
    return draft


def generate(model, ids, count, **options):
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, max_new_tokens=count, **options)


class Calls:
    """How many tokens each call of a model brought, and how many of them were kept."""

    def __init__(self, model):
        self.lengths = []
        self.hook = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model, args, kwargs):
        self.lengths.append(kwargs["input_ids"].shape[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


def test_prompt_lookup_generates_the_greedy_text_of_the_trained_model():
    """Drafts are kept and rejected in numbers, so nothing of the law is idle."""
    model, prompt, count = trained_model(), source_text(300), GREEDY_TOKENS
    with use_gdn_ops(model), Calls(model) as calls:
        text = generate(model, prompt, count, prompt_lookup_num_tokens=4)
    with use_gdn_ops(model):
        expected = generate(model, prompt, count)
    assert torch.equal(text, expected)
    drafted = sum(calls.lengths[1:]) - len(calls.lengths[1:])
    kept = count - len(calls.lengths)
    assert kept > count / 4
    assert drafted - kept > count / 10


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_a_hybrid_draft_model_generates_the_greedy_text(schedule):
    model, prompt, count = trained_model(), source_text(150), 300
    draft = disturbed(model, 0.03)
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.num_assistant_tokens_schedule = schedule
    draft.generation_config.assistant_confidence_threshold = 0
    with use_gdn_ops(model), Calls(model) as calls:
        text = generate(model, prompt, count, assistant_model=draft)
    with use_gdn_ops(model):
        expected = generate(model, prompt, count)
    assert torch.equal(text, expected)
    assert len(calls.lengths) < count * 0.8
    if schedule == "heuristic":
        assert max(calls.lengths[1:]) > 4  # slots were added on the way


def test_a_perfect_draft_has_all_its_tokens_kept():
    """The draft goes back over what it drew exactly as far as it must: then it is never wrong."""
    model, prompt, count, drafted = trained_model(), source_text(100), 100, 4
    draft = copy.deepcopy(model)
    draft.generation_config.num_assistant_tokens = drafted
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0
    with use_gdn_ops(model), Calls(model) as calls:
        generate(model, prompt, count, assistant_model=draft)
    assert len(calls.lengths) == math.ceil(count / (drafted + 1))


def test_a_draft_model_without_a_recurrent_state_serves():
    model, prompt = tiny_model(experts=0), tokens(1, 30)
    torch.manual_seed(1)
    draft = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
        )
    ).eval()
    with use_gdn_ops(model):
        text = generate(model, prompt, 40, assistant_model=draft)
    with use_gdn_ops(model):
        assert torch.equal(text, generate(model, prompt, 40))


@pytest.mark.parametrize("length", [1, 2, 3, 9, 80])
def test_prompts_of_every_length_serve(length):
    """Shorter than the convolution, than the slots, than a chunk, and longer."""
    model, prompt = tiny_model(experts=0), tokens(1, length) % 4 + 1
    with use_gdn_ops(model):
        text = generate(model, prompt, 60, prompt_lookup_num_tokens=5)
    with use_gdn_ops(model):
        assert torch.equal(text, generate(model, prompt, 60))


def test_plain_generation_goes_on_from_the_cache_of_assisted_generation():
    model, prompt = trained_model(), source_text(100)
    with use_gdn_ops(model):
        out = generate(model, prompt, 40, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
        text = generate(model, out.sequences, 20, past_key_values=out.past_key_values)
    with use_gdn_ops(model):
        assert torch.equal(text, generate(model, prompt, 60))


def test_states_may_be_kept_in_bfloat16():
    model, prompt = trained_model(), source_text(60)
    with use_gdn_ops(model, state_dtype=torch.bfloat16):
        out = generate(model, prompt, 10, prompt_lookup_num_tokens=2, return_dict_in_generate=True)
    dtypes = {
        layer.slots._state.dtype
        for layer in out.past_key_values.layers
        if isinstance(layer, SlotLayer)
    }
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("assisted_by", ["prompt lookup", "draft model"])
def test_sampling_keeps_the_distribution(assisted_by):
    """Pairs of tokens, of which the second stands behind kept and rejected drafts.

    By Pinsker's and the Bretagnolle-Huber-Carol inequality the total variation between n draws and
    their distribution over c cells passes sqrt((c ln 2 + ln 1/p) / 2n) with probability p at most.
    """
    model = tiny_model(layers=2, experts=0)
    n, cells, p = 400, 9, 1e-6
    allowed = [1, 2, 3]
    options = {
        "do_sample": True,
        "top_k": 0,
        "suppress_tokens": [i for i in range(VOCABULARY) if i not in allowed],
    }
    prompt = torch.tensor([[1, 2, 3, 1, 2, 1, 3, 1, 2]])
    pairs = torch.zeros(3, 3)
    if assisted_by == "draft model":
        draft = disturbed(model, 0.3)
        draft.generation_config.num_assistant_tokens = 2
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0
        options["assistant_model"] = draft
    else:
        options["prompt_lookup_num_tokens"] = 2
    torch.manual_seed(0)
    with use_gdn_ops(model):
        for _ in range(n):
            text = generate(model, prompt, 2, **options)
            first, second = (text[0, -2:] - 1).tolist()
            pairs[first, second] += 1
    with torch.no_grad(), use_gdn_ops(model):
        expected = torch.zeros(3, 3)
        for i, token in enumerate(allowed):
            logits = model(torch.cat([prompt, torch.tensor([[token]])], 1)).logits[0, :, 1:4]
            expected[i] = logits[-2].softmax(-1)[i] * logits[-1].softmax(-1)
    bound = math.sqrt((cells * math.log(2) + math.log(1 / p)) / (2 * n))
    assert (pairs / n - expected).abs().sum() / 2 < bound
    uniform = torch.full_like(expected, 1 / cells)
    assert (uniform - expected).abs().sum() / 2 > bound  # the law tells the two apart


def test_model_code_is_restored():
    model = tiny_model(experts=0)
    with use_gdn_ops(model) as installation:
        installation.undo()
        with pytest.raises(ValueError, match="stateful"):
            generate(model, tokens(1, 5), 3, prompt_lookup_num_tokens=2)
    base = transformers.Qwen3NextPreTrainedModel
    assert base._is_stateful
    assert "_get_candidate_generator" not in vars(base)


def refusal(model, error=ValueError, prompt=None, **options):
    with use_gdn_ops(model), pytest.raises(error) as caught:
        generate(model, tokens(1, 5) if prompt is None else prompt, 5, **options)
    return str(caught.value)


def test_a_draft_model_of_another_vocabulary_is_refused():
    model = tiny_model(experts=0)
    draft = copy.deepcopy(model)
    draft.config.vocab_size = 300
    # transformers asks for tokenizers first, and would then translate between them.
    said = refusal(model, assistant_model=draft, tokenizer=object(), assistant_tokenizer=object())
    assert said == (
        "assisted generation: assistant_model must have the vocabulary of the model, "
        "vocab_size = 256, got 300"
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_that_holds_tokens_is_refused(rows):
    """Of this batch size or another: transformers would feed it the prompt twice."""
    model = tiny_model(experts=0)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(rows, 4), past_key_values=cache)
    said = refusal(model, NotImplementedError, past_key_values=cache, prompt_lookup_num_tokens=2)
    assert said == "assisted generation: past_key_values must be empty, got a cache of 4 tokens"


def test_other_ways_of_drafting_are_refused():
    model = tiny_model(experts=0)
    said = refusal(
        model, NotImplementedError, assistant_early_exit=1, assistant_model=copy.deepcopy(model)
    )
    assert said.startswith("assisted generation: candidates must come from prompt lookup or")


def test_a_crop_beyond_the_last_step_is_refused():
    model = tiny_model(experts=0)
    with use_gdn_ops(model):
        out = generate(
            model, tokens(1, 5), 5, prompt_lookup_num_tokens=2, return_dict_in_generate=True
        )
    with pytest.raises(ValueError, match=r"crop: tokens_to_remove must be at most \d tokens"):
        out.past_key_values.crop(-4)
