"""Assisted generation of transformers for models with a recurrent state.

    with use_gdn_ops(model):
        model.generate(ids, prompt_lookup_num_tokens=8)
        model.generate(ids, assistant_model=draft)

transformers refuses it for such models: what it rejects, it could not take back from their states.
Here the layers of the cache keep the state after each token of a step (``assisted_cache.py``), and
so a rejection costs nothing. The text is that of plain ``generate``: token for token if greedy, up
to rounding in the logits, and in distribution where it samples. A draft model may be a hybrid model
too, of a family that is served. A cache that was used so keeps its slots, and is of use under
``use_gdn_ops`` only.

Source: Leviathan et al. 2023, Fast inference from transformers via speculative decoding
(https://arxiv.org/abs/2211.17192); docs/speculative.md; tests/test_assisted.py.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    PromptLookupCandidateGenerator,
)
from transformers.generation.utils import GenerationMixin

from gdn_ops.integrations.transformers.assisted_cache import (
    DraftSlots,
    SlotLayer,
    Slots,
    VerifySlots,
)


def assistance(
    module: ModuleType, state_dtype: torch.dtype
) -> Iterator[tuple[type[PreTrainedModel], str, Any]]:
    """What lets the models of a modeling module verify drafted tokens: owner, name and value.

    Nothing where the caches of this release cannot take back tokens.
    """
    if not hasattr(LinearAttentionLayer, "activate_past_recording"):
        return
    for owner in vars(module).values():
        is_base = isinstance(owner, type) and issubclass(owner, PreTrainedModel)
        if is_base and owner.__module__ == module.__name__ and "_is_stateful" in vars(owner):
            yield owner, "_is_stateful", False
            yield owner, "_get_candidate_generator", _maker_of_generators(state_dtype)


def _maker_of_generators(state_dtype: torch.dtype) -> Callable[..., Any]:
    def _get_candidate_generator(self: PreTrainedModel, **arguments: Any) -> Any:
        """What transformers makes, which has slots for all drafted tokens before it drafts them.

        Raises:
            ValueError: a draft model of another vocabulary.
            NotImplementedError: a cache that holds tokens, candidates that are drafted in another
                way, layers with several states.
        """
        draft = arguments["assistant_model"]
        _check_draft(self, draft)
        cache = arguments["model_kwargs"]["past_key_values"]
        _check_cache(cache)
        generator = GenerationMixin._get_candidate_generator(self, **arguments)
        own = _keep_slots(cache, VerifySlots, state_dtype)
        drafting: list[Slots] = []
        if type(generator) is AssistedCandidateGenerator:
            draft_cache = DynamicCache(config=draft.config.get_text_config(decoder=True))
            drafting = _keep_slots(draft_cache, DraftSlots, state_dtype)
            if drafting:
                generator.assistant_kwargs["past_key_values"] = draft_cache
        elif type(generator) is not PromptLookupCandidateGenerator:
            raise NotImplementedError(
                "assisted generation: candidates must come from prompt lookup or from a draft "
                f"model of the same vocabulary, got {type(generator).__name__}"
            )
        _reserve_before_drafts(generator, own, drafting)
        return generator

    return _get_candidate_generator


def _reserve_before_drafts(generator: Any, own: list[Slots], drafting: list[Slots]) -> None:
    draw = generator.get_candidates

    def get_candidates(input_ids: Tensor, **kwargs: Any) -> Any:
        for slots in drafting:
            # All that it draws may be rejected, and the token before them is fed again.
            slots.reserve(int(generator.num_assistant_tokens) + 2)
        ids, logits = draw(input_ids, **kwargs)
        for slots in own:
            slots.reserve(ids.shape[1] - input_ids.shape[1] + 1)
        return ids, logits

    generator.get_candidates = get_candidates


def _check_draft(model: PreTrainedModel, draft: PreTrainedModel | None) -> None:
    if draft is None:
        return
    own, other = (m.config.get_text_config().vocab_size for m in (model, draft))
    if own != other:
        raise ValueError(
            f"assisted generation: assistant_model must have the vocabulary of the model, "
            f"vocab_size = {own}, got {other}"
        )


def _check_cache(cache: DynamicCache) -> None:
    # transformers 5.23 feeds the whole prompt again after what such a cache holds, and so generates
    # a wrong text without a word, with models of attention alone too.
    if (length := int(cache.get_seq_length())) > 0:
        raise NotImplementedError(
            f"assisted generation: past_key_values must be empty, got a cache of {length} tokens"
        )


def _keep_slots(cache: DynamicCache, kind: type[Slots], state_dtype: torch.dtype) -> list[Slots]:
    """Give each recurrent layer of a cache its slots, unless it has them; returns those."""
    found = []
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            continue
        if not isinstance(layer, SlotLayer):
            if type(layer) is not LinearAttentionLayer or layer.number_of_states != 1:
                raise NotImplementedError(
                    f"assisted generation: layer {i} of the cache must have one recurrent state, "
                    f"got {type(layer).__name__} of {layer.number_of_states}"
                )
            cache.layers[i] = layer = SlotLayer(kind(1, state_dtype))
        found.append(layer.slots)
    return found
