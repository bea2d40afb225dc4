"""Assisted generation of transformers for models with a recurrent state.

    with assisted_generation(model):
        model.generate(ids, prompt_lookup_num_tokens=8)
        model.generate(ids, assistant_model=draft)

transformers refuses it for such models: what it rejects, it could not take back from their states.
Here the layers of the cache keep the state after each token of a step (``assisted_cache.py``), and
so a rejection costs nothing.

Source: docs/speculative.md; tests/test_assisted.py.
"""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    PromptLookupCandidateGenerator,
)

from gdn_ops.integrations.assisted_cache import DraftSlots, SlotLayer, Slots, VerifySlots
from gdn_ops.integrations.transformers import use_gdn_ops

# What is set on the model while an installation is in force.
_NAMES = ("_is_stateful", "_get_candidate_generator")


class AssistedGeneration:
    """What ``assisted_generation`` returns: ends by ``undo()`` or at the end of a block."""

    def __init__(self, model: PreTrainedModel, state_dtype: torch.dtype) -> None:
        self._model = model
        self._state_dtype = state_dtype
        self._functions = use_gdn_ops(model, state_dtype=state_dtype)
        self._before = {name: vars(model)[name] for name in _NAMES if name in vars(model)}
        self._make_generator = model._get_candidate_generator
        model._is_stateful = False
        model._get_candidate_generator = self._candidate_generator
        self._undone = False

    def undo(self) -> None:
        """End it; twice is once."""
        if self._undone:
            return
        self._undone = True
        for name in _NAMES:
            delattr(self._model, name)
        for name, value in self._before.items():
            setattr(self._model, name, value)
        self._functions.undo()

    def __enter__(self) -> "AssistedGeneration":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def _candidate_generator(self, **arguments: Any) -> Any:
        """What transformers makes, which has slots for all drafted tokens before it drafts them."""
        draft = arguments["assistant_model"]
        _check_draft(self._model, draft)
        cache = arguments["model_kwargs"]["past_key_values"]
        _check_cache(cache)
        generator = self._make_generator(**arguments)
        own = _keep_slots(cache, VerifySlots, self._state_dtype)
        drafting: list[Slots] = []
        if type(generator) is AssistedCandidateGenerator:
            draft_cache = DynamicCache(config=draft.config.get_text_config(decoder=True))
            drafting = _keep_slots(draft_cache, DraftSlots, self._state_dtype)
            if drafting:
                generator.assistant_kwargs["past_key_values"] = draft_cache
        elif type(generator) is not PromptLookupCandidateGenerator:
            raise NotImplementedError(
                "assisted_generation: candidates must come from prompt lookup or from a draft "
                f"model of the same vocabulary, got {type(generator).__name__}"
            )
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
        return generator


def assisted_generation(
    model: PreTrainedModel, *, state_dtype: torch.dtype = torch.float32
) -> AssistedGeneration:
    """Let ``model.generate`` verify drafted tokens: a function and a context manager.

        with assisted_generation(model):
            model.generate(ids, prompt_lookup_num_tokens=8)
            model.generate(ids, assistant_model=draft)

    Holds for this model; it includes ``use_gdn_ops(model)``. The text is that of plain
    ``generate``: token for token if greedy, up to rounding in the logits, and in distribution where
    it samples. A draft model may be a hybrid model too, of a family that is served. A cache that
    was used so keeps its slots, and is of use under ``use_gdn_ops`` only.

    Args:
        model: A model of transformers with ``generate`` and gated delta net layers.
        state_dtype: float32, bfloat16 or float16: the dtype of the states. Default: float32.

    Returns:
        An object with ``undo()``, which ends it; also a context manager.

    Raises:
        ValueError: ``model`` has no layer that is served, or no ``generate``. While it generates: a
            draft model of another vocabulary, or more than one prompt.
        NotImplementedError: this release of transformers cannot take back tokens. While it
            generates: a cache that holds tokens, candidates that are drafted in another way, layers
            with several states.

    Source: Leviathan et al. 2023, Fast inference from transformers via speculative decoding
    (https://arxiv.org/abs/2211.17192); tests/test_assisted.py.
    """
    if not hasattr(model, "_get_candidate_generator"):
        raise ValueError(
            f"assisted_generation: model must have generate, got {type(model).__name__}"
        )
    if not hasattr(LinearAttentionLayer, "activate_past_recording"):
        from transformers import __version__

        raise NotImplementedError(
            "assisted_generation: transformers must have caches that record the past, as 5.23, "
            f"got {__version__}"
        )
    return AssistedGeneration(model, state_dtype)


def _check_draft(model: PreTrainedModel, draft: PreTrainedModel | None) -> None:
    if draft is None:
        return
    own, other = (m.config.get_text_config().vocab_size for m in (model, draft))
    if own != other:
        raise ValueError(
            f"assisted_generation: assistant_model must have the vocabulary of the model, "
            f"vocab_size = {own}, got {other}"
        )


def _check_cache(cache: DynamicCache) -> None:
    # transformers 5.23 feeds the whole prompt again after what such a cache holds, and so generates
    # a wrong text without a word, with models of attention alone too.
    if (length := int(cache.get_seq_length())) > 0:
        raise NotImplementedError(
            f"assisted_generation: past_key_values must be empty, got a cache of {length} tokens"
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
                    f"assisted_generation: layer {i} of the cache must have one recurrent state, "
                    f"got {type(layer).__name__} of {layer.number_of_states}"
                )
            cache.layers[i] = layer = SlotLayer(kind(1, state_dtype))
        found.append(layer.slots)
    return found
