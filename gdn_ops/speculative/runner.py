"""A model of transformers over the rows of a cache: the calls that decoder and draft share."""

from typing import Any

import torch
from torch import Tensor, nn

from gdn_ops.integrations.transformers import Installation, use_gdn_ops
from gdn_ops.speculative.cache import Phase, RowCache, Rows


class Runner:
    """Calls a model on a cache of its own; everything in it stays on the device."""

    def __init__(
        self,
        model: Any,
        batch_size: int,
        S: int,
        length: int,
        state_dtype: torch.dtype,
        exact: bool = False,
    ) -> None:
        self.model = model
        config = model.config.get_text_config(decoder=True)
        if (kind := config._attn_implementation) != "sdpa":
            raise NotImplementedError(
                f"SpeculativeDecoder: model must have attn_implementation 'sdpa', got {kind!r}"
            )
        self._names_masks = getattr(config, "layer_types", None) is not None
        self.rows = Rows(batch_size, S, length, model.device)
        self.cache = RowCache(config, self.rows, state_dtype, exact)

    @torch.no_grad()
    def allocate(self) -> None:
        """A token through the model shows the shapes of all states."""
        first = torch.zeros(1, dtype=torch.int64, device=self.rows.table.device)
        self.prefill(first, first[:, None])

    def prefill(self, row: Tensor, prompt: Tensor) -> Tensor:
        """Start ``row [1]`` from a prompt ``[1, T]``; logits of the next token, ``[1, 1, n]``."""
        positions = torch.arange(prompt.shape[1], device=prompt.device)[None]
        with self.rows.during(Phase.PREFILL, row, positions):
            return self._call(prompt, positions, None, logits_to_keep=1)

    def step(self, phase: Phase, ids: Tensor, first: Tensor) -> Tensor:
        """Logits ``[B, T, n]`` of tokens ``[B, T]``, each row's from its position ``first [B]``."""
        positions = first[:, None] + torch.arange(ids.shape[1], device=ids.device)
        every = torch.arange(ids.shape[0], device=ids.device)
        with self.rows.during(phase, every, positions):
            return self._call(ids, positions, self.rows.visible(positions))

    def _call(self, ids: Tensor, positions: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        masks = {"full_attention": mask, "linear_attention": None} if self._names_masks else mask
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=masks,
            past_key_values=self.cache,
            use_cache=True,
            **kwargs,
        ).logits
        return logits


def install(model: nn.Module) -> Installation:
    """Put the operators under a model, if it has layers for them."""
    return use_gdn_ops(model) if is_hybrid(model) else Installation([])


def is_hybrid(model: nn.Module) -> bool:
    """Whether a model has gated delta net layers."""
    return any(type(m).__name__.endswith("GatedDeltaNet") for m in model.modules())
