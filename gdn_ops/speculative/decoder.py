"""Speculative decoding of a batch, one compiled graph a step.

    drafts   = proposer(text)                                k tokens for each row
    logits   = model(last token, drafts)                     S = 1 + k tokens, each with its state
    choice_t = argmax or a sample of logits_t
    kept     = 1 + number of t with drafts_1 .. drafts_t = choice_0 .. choice_{t-1}
    text    += choice_0 .. choice_{kept-1}

The choice does not know the drafts, so the text has the distribution of plain decoding. What was
rejected is taken back by ``kept``: a row's next step starts from the state in slot ``kept - 1``. A
row that drafted less, or nothing, has the same shape, and its last places are never kept.

Source: Leviathan et al. 2023, Fast inference from transformers via speculative decoding
(https://arxiv.org/abs/2211.17192); docs/speculative.md; tests/test_speculative.py.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gdn_ops.integrations.transformers.installation import check_state_dtype
from gdn_ops.speculative.cache import Phase, static
from gdn_ops.speculative.proposer import PromptLookup, Proposer
from gdn_ops.speculative.runner import Runner, install, is_hybrid


class SpeculativeDecoder:
    """Decodes a batch of sequences, several tokens a step, with the text of plain decoding.

        with SpeculativeDecoder(model, 8, 2048, 4, PromptLookup()) as decoder:
            texts = decoder.generate(prompts, max_new_tokens=500)

    Or step by step: ``prefill`` starts a row from a prompt, ``step`` brings all active rows on by 1
    to ``1 + num_draft_tokens`` tokens. A step is one graph of fixed shapes on tensors at fixed
    addresses, and waits for nothing on the host; ``tokens``, ``lengths`` and ``active`` are device
    tensors to read when wanted. Rows do not see each other: each is as far as its drafts were good.

    Until ``close()`` or the end of the block the operators are under the model code, as by
    ``use_gdn_ops``.

    Args:
        model: A causal model of transformers with gated delta net layers, in eval mode, with
            ``attn_implementation="sdpa"``.
        batch_size: Rows, ``B``.
        max_length: Tokens of a text at most, its prompt included.
        num_draft_tokens: Tokens drafted for each row and step, ``k``; 0 is plain decoding.
        proposer: Who drafts them. Default: ``PromptLookup()``.
        temperature: Samples from ``softmax(logits / temperature)``; 0 takes the most likely token.
            Default: 0.
        eos_token_id: The token that ends a text, or several. Default: none.
        state_dtype: float32, bfloat16 or float16: dtype of the recurrent states. Default: float32.
        exact: ``recurrent_(..., exact=True)``: a step leaves the bits in a recurrent state that one
            token after the other would, given the same inputs. Default: False.
        compile_options: Keyword arguments of ``torch.compile``, such as
            ``{"mode": "reduce-overhead"}``; None runs without it. Default: none are given.
        compile_prefill: Compile prompts too: one graph for every length. Default: False.

    Attributes:
        tokens: The texts, ``[B, max_length + k + 1]``, int64; places from a row's length on mean
            nothing.
        lengths: Tokens of each text, ``[B]``, int64.

    Raises:
        ValueError: a number is out of its range, or the model has no gated delta net layers.
        NotImplementedError: a layer or an attention implementation that is not served.

    Source: Leviathan et al. 2023; tests/test_speculative.py.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int,
        max_length: int,
        num_draft_tokens: int,
        proposer: Proposer | None = None,
        *,
        temperature: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        state_dtype: torch.dtype = torch.float32,
        exact: bool = False,
        compile_options: Mapping[str, Any] | None = {},
        compile_prefill: bool = False,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 2),
            ("num_draft_tokens", num_draft_tokens, 0),
            ("temperature", temperature, 0),
        ):
            if value < least:
                raise ValueError(
                    f"SpeculativeDecoder: {name} must be at least {least}, got {value}"
                )
        check_state_dtype("SpeculativeDecoder", state_dtype)
        if not is_hybrid(model):
            raise ValueError(
                f"SpeculativeDecoder: model must have gated delta net layers, "
                f"got {type(model).__name__}"
            )
        self.max_length, self._k = max_length, num_draft_tokens
        self._temperature = temperature
        device, S = model.device, 1 + num_draft_tokens
        length = max_length + S  # a step may write so far, and what is past max_length is cut off
        self.tokens = static(torch.zeros(batch_size, length, dtype=torch.int64, device=device))
        self.lengths = static(torch.zeros(batch_size, dtype=torch.int64, device=device))
        self._limits = static(torch.zeros_like(self.lengths))
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
        self._ends = static(torch.tensor(ends, dtype=torch.int64, device=device))
        self._proposer = PromptLookup() if proposer is None else proposer
        self._functions = install(model)
        try:
            self._runner = Runner(model, batch_size, S, length, state_dtype, exact)
            self._runner.allocate()
            self._proposer.prepare(model, batch_size, length, num_draft_tokens, state_dtype)
        except BaseException:
            self.close()
            raise
        self._run_prefill, self._run_step = self._prefill, self._step
        if compile_options is not None:
            options = {"fullgraph": True, **compile_options}
            if compile_prefill:
                self._run_prefill = torch.compile(self._prefill, **options)
            self._run_step = torch.compile(self._step, **options)

    @property
    def active(self) -> Tensor:
        """Which rows have a text that is not at its end, ``[B]``, bool."""
        return self._runner.rows.accepted > 0

    @torch.no_grad()
    def prefill(self, row: int, prompt: Tensor, max_new_tokens: int | None = None) -> None:
        """Start a row from a prompt, whatever it held, and choose its first token.

        Args:
            row: Its number, less than ``batch_size``.
            prompt: Tokens ``[T]``, ``1 <= T < max_length``, int64.
            max_new_tokens: The text ends after so many, at least 1. Default: at ``max_length``.

        Raises:
            ValueError: an argument breaks one of these rules.
        """
        if not 0 <= row < self.lengths.shape[0]:
            raise ValueError(
                f"prefill: row must be less than batch_size = {self.lengths.shape[0]}, got {row}"
            )
        if prompt.dim() != 1 or not 1 <= prompt.shape[0] < self.max_length:
            raise ValueError(
                f"prefill: prompt must have shape [T], 1 <= T < max_length = {self.max_length}, "
                f"got {list(prompt.shape)}"
            )
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"prefill: max_new_tokens must be at least 1, got {max_new_tokens}")
        T, device = prompt.shape[0], self.tokens.device
        end = self.max_length if max_new_tokens is None else T + max_new_tokens
        self.tokens[row, :T] = prompt.to(device)
        self._limits[row] = min(end, self.max_length)
        ids = prompt.to(device)[None].contiguous()
        # One graph serves every length, and, since its number is a tensor, every row.
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        self._run_prefill(torch.tensor([row], device=device), ids)

    @torch.no_grad()
    def step(self) -> None:
        """Bring every active row on by 1 to ``1 + num_draft_tokens`` tokens; the others wait."""
        self._run_step()

    def generate(
        self, prompts: Sequence[Tensor], max_new_tokens: int | None = None
    ) -> list[Tensor]:
        """Texts of any number of prompts; a row that ends takes the next one.

        Args:
            prompts: Tokens ``[T]`` each, ``1 <= T < max_length``, int64.
            max_new_tokens: Each text ends after so many. Default: at ``max_length``.

        Returns:
            The texts with their prompts, in the order of the prompts, each ``[length]``, on the
            device of the model. One that ends with ``eos_token_id`` includes it.

        Raises:
            ValueError: as ``prefill``.
        """
        waiting = list(enumerate(prompts))[::-1]
        owner: dict[int, int] = {}
        texts: dict[int, Tensor] = {}
        self._runner.rows.accepted.zero_()
        while waiting or owner:
            active = self.active.tolist()
            for row in [row for row in owner if not active[row]]:
                texts[owner.pop(row)] = self.text(row)
            free = [row for row in range(len(active)) if row not in owner]
            for row in free[: len(waiting)]:
                owner[row], prompt = waiting.pop()
                self.prefill(row, prompt, max_new_tokens)
            if owner:
                self.step()
        return [texts[i] for i in range(len(prompts))]

    def text(self, row: int) -> Tensor:
        """The text of a row so far, ``[length]``; a new tensor."""
        return self.tokens[row, : int(self.lengths[row])].clone()

    def close(self) -> None:
        """Restore the model code; twice is once."""
        self._proposer.close()
        self._functions.undo()

    def __enter__(self) -> "SpeculativeDecoder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _prefill(self, row: Tensor, prompt: Tensor) -> None:
        T = prompt.shape[1]
        choice = self._choose(self._runner.prefill(row, prompt))[:, 0]
        if self._k > 0:
            self._proposer.prefill(row, prompt)
        self.tokens.index_put_((row, torch.full_like(row, T)), choice)
        self.lengths.index_put_((row,), torch.full_like(row, T + 1))
        ended = torch.isin(choice, self._ends) | (self._limits[row] <= T + 1)
        accepted = self._runner.rows.accepted
        accepted.index_copy_(0, row, (~ended).to(accepted.dtype))

    def _step(self) -> None:
        tokens, lengths, accepted = self.tokens, self.lengths, self._runner.rows.accepted
        live = accepted > 0
        ids = tokens.gather(1, (lengths - 1).clamp(min=0)[:, None])
        matching = torch.zeros_like(lengths)
        if self._k > 0:
            drafts, counts = self._proposer.propose(tokens, lengths, accepted)
            ids = torch.cat([ids, drafts], 1)
        first = (lengths - 1).clamp(min=0)
        choice = self._choose(self._runner.step(Phase.VERIFY, ids, first))
        ahead = torch.arange(1 + self._k, device=tokens.device)
        if self._k > 0:
            same = (choice[:, :-1] == drafts) & (ahead[:-1] < counts[:, None])
            matching = same.long().cumprod(1).sum(1)
        kept = torch.minimum(1 + matching, self._limits - lengths)
        ends = torch.isin(choice, self._ends) & (ahead < kept[:, None])
        kept = torch.where(ends.any(1), ends.long().argmax(1) + 1, kept)
        kept = torch.where(live, kept, 0)
        places = lengths[:, None] + ahead
        written = torch.where(ahead < kept[:, None], choice, tokens.gather(1, places))
        tokens.scatter_(1, places, written)
        lengths.add_(kept)
        ended = ends.any(1) | (lengths >= self._limits)
        accepted.copy_(torch.where(ended, 0, kept))

    def _choose(self, logits: Tensor) -> Tensor:
        """Tokens ``[B, T]`` of logits ``[B, T, n]``.

        A sample is the largest sum of a logit and Gumbel noise, which needs no cumulated sums.
        """
        if self._temperature > 0:
            logits = logits.float() / self._temperature
            logits = logits - torch.empty_like(logits).exponential_().log()
        return logits.argmax(-1)
