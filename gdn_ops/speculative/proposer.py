"""Who drafts: the interface of a proposer, and the one that looks into the text so far."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Proposer(ABC):
    """Drafts the next tokens of every row, inside the compiled step of a ``SpeculativeDecoder``.

    What it drafts changes how many tokens a step yields, never which.
    """

    def prepare(  # noqa: B027  optional
        self, model: Any, batch_size: int, length: int, num_draft_tokens: int, state_dtype: Any
    ) -> None:
        """Called once, by the decoder that it serves.

        Args:
            model: The model of the decoder.
            batch_size: Rows.
            length: Places of a row in the buffer of the text.
            num_draft_tokens: How many tokens ``propose`` drafts.
            state_dtype: Of recurrent states.
        """

    def prefill(self, row: Tensor, prompt: Tensor) -> None:  # noqa: B027  optional
        """A row ``[1]`` starts from a prompt ``[1, T]``; part of the compiled prefill."""

    @abstractmethod
    def propose(self, tokens: Tensor, lengths: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        """Draft the tokens after each row's text; only tensor operations of fixed shapes.

        Args:
            tokens: The texts, ``[B, length]``, int64; places from a row's length on mean nothing.
            lengths: Tokens of each text, ``[B]``, int64; 0 in a row that was never used.
            accepted: How many of them came with the last step, ``[B]``, int32; 0 in an idle row.

        Returns:
            drafts: ``[B, num_draft_tokens]``, int64.
            counts: How many of them are meant, ``[B]``, int64, in ``0 .. num_draft_tokens``.
        """

    def close(self) -> None:  # noqa: B027  optional
        """Give back what ``prepare`` took."""


class PromptLookup(Proposer):
    """Drafts what followed the last occurrence of the last tokens.

    The longest run of up to ``max_ngram`` last tokens that the text has seen before counts, and of
    its places the latest. Where the text ends before enough tokens followed, it is taken to go on
    with the same period. A row that has seen no such run drafts nothing.

    Args:
        max_ngram: Tokens that are compared at most, at least 1. Default: 3.

    Raises:
        ValueError: ``max_ngram`` is less than 1.

    Source: Saxena 2023, Prompt lookup decoding
    (https://github.com/apoorvumang/prompt-lookup-decoding); tests/test_speculative.py.
    """

    def __init__(self, max_ngram: int = 3) -> None:
        if max_ngram < 1:
            raise ValueError(f"PromptLookup: max_ngram must be at least 1, got {max_ngram}")
        self._max_ngram = max_ngram
        self._count = 0

    def prepare(
        self, model: Any, batch_size: int, length: int, num_draft_tokens: int, state_dtype: Any
    ) -> None:
        self._count = num_draft_tokens

    def propose(self, tokens: Tensor, lengths: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        equal = place < lengths[:, None] - 1
        run = torch.zeros_like(tokens)  # how many tokens up to a place equal the last ones
        for i in range(self._max_ngram):
            last = tokens.gather(1, (lengths[:, None] - 1 - i).clamp(min=0))
            before = torch.nn.functional.pad(tokens, (i, 0))[:, : tokens.shape[1]]
            equal = equal & (before == last) & (place >= i)
            run = run + equal
        score, best = (run * tokens.shape[1] + place * (run > 0)).max(1)
        found = score > 0
        start = torch.where(found, best + 1, 0)
        period = (lengths - start).clamp(min=1)
        ahead = torch.arange(self._count, device=tokens.device) % period[:, None]
        return tokens.gather(1, start[:, None] + ahead), found * self._count
