"""Rows of a whole layer and of a small model of transformers: with the operators, and without.

``layer`` is a GDN layer of Qwen3-Next, ``model`` four layers of Qwen3.5 (three of GDN, one of
attention, no head), with the sizes that the configurations of transformers have by default, in
bfloat16. A row of one token is a decode step after a prompt, its states in a cache; all else is a
prefill into an empty cache. Weights are random.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks import exact, ours
from benchmarks.contender import NotServed
from benchmarks.entry import Side, refuse
from benchmarks.rows import Row
from benchmarks.timing import as_called

COMPILED = " compiled"
# transformers with its own PyTorch functions, and with the library that it prefers.
TRANSFORMERS, WITH_FLA = "HF", "HF with FLA"
PROMPT, CACHE = 128, 2048
# Calls after which all is compiled and captured.
WARM_UP = 4
# Its loop over chunks is unrolled: Inductor took 36 s for 32 chunks of one layer on a CPU.
MOST_UNROLLED_LAYERS = 1

Sizes = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A layer or a model, and the configuration that its caches are made of."""

    module: nn.Module
    config: Any
    code: Any  # the module of Python that has its functions
    own: dict[str, Callable]  # those functions, past the dispatch to an installed library

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        """Hidden states ``[N, T, hidden_size]`` in and out."""
        if self.is_layer:
            return self.module(x, cache)
        return self.module(inputs_embeds=x, past_key_values=cache).last_hidden_state

    @property
    def is_layer(self) -> bool:
        return type(self.module).__name__.endswith("GatedDeltaNet")


def make_subject(name: str, sizes: Sizes, device: str) -> Subject:
    """A ``layer`` or a ``model``; ``sizes`` are those that differ from the configuration's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that find no GPU
        import transformers

        from gdn_ops.integrations.transformers import REPLACEMENTS

        family = "qwen3_next" if name == "layer" else "qwen3_5"
        code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    types = ["linear_attention"] * (1 if name == "layer" else 3)
    types += [] if name == "layer" else ["full_attention"]
    common = {"num_hidden_layers": len(types), "layer_types": types, "vocab_size": 1}
    torch.manual_seed(0)
    with torch.device(device):
        if name == "layer":
            config = transformers.Qwen3NextConfig(**common, **sizes)
            module = code.Qwen3NextGatedDeltaNet(config, layer_idx=0)
        else:
            config = transformers.Qwen3_5TextConfig(**common, **sizes, attn_implementation="sdpa")
            module = code.Qwen3_5TextModel(config)
    own = {name: inspect.unwrap(getattr(code, name)) for name in REPLACEMENTS}
    return Subject(module.bfloat16().eval().requires_grad_(False), config, code, own)


@contextlib.contextmanager
def functions_of(side: str, subject: Subject) -> Iterator[None]:
    """Until the end of the block the model code calls the functions of a side.

    Raises:
        ImportError: the side is transformers with FLA, and there is none.
    """
    from gdn_ops.integrations.transformers import use_gdn_ops

    if side.startswith(ours.NAME):
        with use_gdn_ops(subject.module):
            yield
        return
    if side.startswith(WITH_FLA):
        importlib.import_module("fla.ops.gated_delta_rule")
        yield
        return
    originals = {name: getattr(subject.code, name) for name in subject.own}
    try:
        for name, function in subject.own.items():
            setattr(subject.code, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(subject.code, name, function)


class Runner:
    """One side of a row: its cache, and the call to check and to time."""

    def __init__(self, side: str, row: Row, subject: Subject, tokens: Tensor) -> None:
        from transformers import StaticCache

        self.side, self.row, self.subject = side, row, subject
        self.x = tokens[:, -row.T :]
        self.cache = StaticCache(config=subject.config, max_cache_len=max(CACHE, row.T))
        forward = subject.forward
        if side == ours.NAME or side.endswith(COMPILED):
            options = {"mode": "reduce-overhead"} if tokens.is_cuda else {"backend": "aot_eager"}
            forward = torch.compile(forward, fullgraph=side == ours.NAME, dynamic=False, **options)
        self.call = functools.partial(forward, self.x, self.cache)
        # Eagerly: so the tensors of the cache are made, and marked to stay where they are.
        subject.forward(tokens[:, :PROMPT], self.cache)

    def prepare(self) -> None:
        """A prefill starts from an empty cache."""
        if self.row.T > 1:
            self.cache.reset()

    def results(self) -> dict[str, Tensor]:
        """The hidden states and the recurrent states after one call."""
        self.prepare()
        o = self.call().float()
        layers = (layer for layer in self.cache.layers if hasattr(layer, "recurrent_states"))
        return {"o": o, "state": torch.stack([layer.recurrent_states[0] for layer in layers])}


class Comparison:
    """All sides of a row, on the same weights and hidden states."""

    def __init__(self, row: Row, sizes: Sizes, device: str) -> None:
        self.row, self.sizes, self.device = row, sizes, device
        self.runners: dict[str, Runner] = {}
        self.skips: dict[str, int] = {}

    @functools.cached_property
    def subject(self) -> Subject:
        return make_subject(self.row.name, self.sizes, self.device)

    @functools.cached_property
    def tokens(self) -> Tensor:
        """A prompt, and one token more for a decode step."""
        torch.manual_seed(1)
        length = PROMPT + 1 if self.row.T == 1 else self.row.T
        size = (self.row.N, length, self.subject.config.hidden_size)
        return torch.randn(size, device=self.device).bfloat16()

    @functools.cached_property
    def exact(self) -> dict[str, Tensor]:
        """The results in float32, by the functions of transformers."""
        module = copy.deepcopy(self.subject.module).float()
        subject = dataclasses.replace(self.subject, module=module)
        with functions_of(TRANSFORMERS, subject):
            return Runner(TRANSFORMERS, self.row, subject, self.tokens.float()).results()

    @functools.cached_property
    def rounding(self) -> dict[str, float]:
        """The errors of transformers' own functions in bfloat16."""
        with functions_of(TRANSFORMERS, self.subject):
            runner = Runner(TRANSFORMERS, self.row, self.subject, self.tokens)
            return exact.errors(runner.results(), self.exact)

    @torch.no_grad()
    def check(self, side: str) -> dict[str, float]:
        """Errors of one call.

        Raises:
            ImportError: transformers or FLA is not installed.
            NotServed: it would take too long to compile.
            Wrong: an error is more than twice that of transformers' own functions in bfloat16.
        """
        subject = self.subject
        unrolled = sum(kind == "linear_attention" for kind in subject.config.layer_types)
        if side == TRANSFORMERS + COMPILED and self.row.T > 1 and unrolled > MOST_UNROLLED_LAYERS:
            raise NotServed("its loop over chunks is unrolled in each layer: too long to compile")
        rounding = self.rounding
        counters.clear()
        with functions_of(side, subject):
            runner = Runner(side, self.row, subject, self.tokens)
            results = runner.results()
            for _ in range(WARM_UP):
                runner.prepare()
                runner.call()
        found = exact.errors(results, self.exact)
        refuse(found, lambda name: 2 * rounding[name])
        self.skips[side] = counters["inductor"]["cudagraph_skips"]
        self.runners[side] = runner
        return found

    def sample(self, side: str) -> tuple[list[float], list[float]]:
        """Microseconds of a few calls, whole and on the GPU alone."""
        runner = self.runners[side]
        with functions_of(side, self.subject):
            return as_called(runner.call, runner.prepare)

    def about(self, side: str) -> dict[str, int]:
        """The least bytes and operations, and how many graphs were no CUDA graphs."""
        skips = self.skips[side]
        return self.least() | ({"cudagraph_skips": skips} if skips else {})

    def least(self) -> dict[str, int]:
        """Each weight read once, and a state once or twice; two operations a weight and token.

        Attention, keys, values and the recurrence itself do not count.
        """
        weights = [p for name, p in self.subject.module.named_parameters() if "embed" not in name]
        state = self.exact["state"]
        moved = sum(p.numel() * p.element_size() for p in weights)
        moved += 2 * self.tokens[:, -self.row.T :].numel() * self.tokens.element_size()
        moved += state.numel() * state.element_size() * (2 if self.row.T == 1 else 1)
        matrices = sum(p.numel() for p in weights if p.dim() == 2)
        return {"bytes": moved, "flops": 2 * matrices * self.row.N * self.row.T}


def sides_of(peers: tuple[str, ...]) -> list[str]:
    """Ours, then transformers without us; each eager and compiled, as far as it goes."""
    sides = [ours.NAME, ours.EAGER]
    if "hugging_face" in peers:
        sides += [TRANSFORMERS, TRANSFORMERS + COMPILED]
        sides += [WITH_FLA, WITH_FLA + COMPILED] if "fla" in peers else []
    return sides


def sides(
    row: Row, peers: tuple[str, ...], sizes: Sizes | None = None, device: str = "cuda"
) -> list[Side]:
    """Every side, on the same weights and hidden states."""
    comparison = Comparison(row, sizes or {}, device)
    return [
        Side(
            name,
            functools.partial(comparison.check, name),
            functools.partial(comparison.sample, name),
            functools.partial(comparison.about, name),
        )
        for name in sides_of(peers)
    ]
