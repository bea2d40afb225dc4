"""A proposer that asks a smaller model, which may be a hybrid model itself."""

from typing import Any

import torch
from torch import Tensor

from gdn_ops.integrations.transformers import Installation
from gdn_ops.speculative.cache import Phase
from gdn_ops.speculative.proposer import Proposer
from gdn_ops.speculative.runner import Runner, install


class DraftModel(Proposer):
    """Drafts greedily with another model of the same vocabulary.

    In each step it first reads the tokens that were kept of the last step, all in one call, and so
    knows the first drafted token; the others take a call each, on scratch states that the next step
    forgets. All of them are part of the one graph of the step.

    Args:
        model: A causal model of transformers, of attention or hybrid, on the device of the model
            that it drafts for.

    Raises:
        ValueError: when a decoder takes it: its vocabulary is another, or so is its device.

    Source: Leviathan et al. 2023, Fast inference from transformers via speculative decoding
    (https://arxiv.org/abs/2211.17192); tests/test_speculative.py.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._runner: Runner | None = None
        self._functions: Installation | None = None
        self._count = 0

    def prepare(
        self, model: Any, batch_size: int, length: int, num_draft_tokens: int, state_dtype: Any
    ) -> None:
        own, other = (m.config.get_text_config().vocab_size for m in (self._model, model))
        if own != other:
            raise ValueError(
                f"DraftModel: model must have the vocabulary of the model that it drafts for, "
                f"vocab_size = {other}, got {own}"
            )
        if self._model.device != model.device:
            raise ValueError(
                f"DraftModel: model must be on {model.device}, got {self._model.device}"
            )
        self._count = num_draft_tokens
        self._functions = install(self._model)
        S = 1 + num_draft_tokens
        self._runner = Runner(self._model, batch_size, S, length, state_dtype)
        self._runner.allocate()

    def prefill(self, row: Tensor, prompt: Tensor) -> None:
        assert self._runner is not None
        self._runner.prefill(row, prompt)
        accepted = self._runner.rows.accepted
        accepted.index_fill_(0, row, 1)

    def propose(self, tokens: Tensor, lengths: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        assert self._runner is not None
        runner, rows = self._runner, self._runner.rows
        kept = accepted.long()
        rows.accepted.copy_(torch.where(accepted > 0, rows.accepted, 0))
        first = (lengths - kept).clamp(min=0)
        ids = tokens.gather(1, first[:, None] + torch.arange(rows.S, device=tokens.device))
        logits = runner.step(Phase.VERIFY, ids, first)
        rows.accepted.copy_(accepted)
        at_last = (kept - 1).clamp(min=0)[:, None]
        drafts = [logits.argmax(-1).gather(1, at_last)]
        for i in range(1, self._count):
            phase = Phase.BRANCH if i == 1 else Phase.DRAW
            logits = runner.step(phase, drafts[-1], lengths + i - 1)
            drafts.append(logits.argmax(-1))
        return torch.cat(drafts, 1), torch.full_like(lengths, self._count)

    def close(self) -> None:
        if self._functions is not None:
            self._functions.undo()
