"""The PyTorch functions that transformers runs where no kernel library is installed, eagerly."""

import inspect
import warnings
from collections.abc import Callable

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contender import Call, NotServed, gradients, tokens_of
from benchmarks.peers.gates import gated
from benchmarks.rows import Row

NAME = "HF"
PACKAGE = "transformers"
# Its loop over chunks launches some 30 kernels for each 64 tokens.
MOST_TOKENS = 8192


def functions() -> tuple[Callable, Callable]:
    """The chunked and the token-by-token one, past the dispatch to an installed library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that find no GPU
        from transformers.models.qwen3_next import modeling_qwen3_next as model_code
    return (
        inspect.unwrap(model_code.torch_chunk_gated_delta_rule),
        inspect.unwrap(model_code.torch_recurrent_gated_delta_rule),
    )


def of_repeated_heads(function: Callable) -> Callable:
    """As layers of transformers 5.17 call it: a key head for each value head."""

    def call(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple:
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
        return function(q, k, v, **options)

    return call


def make_call(row: Row, case: Case) -> Call:
    chunked, recurrent = map(of_repeated_heads, functions())
    if row.name in ("verify", "verify_once"):
        raise NotServed("no step of several tokens that keeps the state after each")
    if row.N * row.T > MOST_TOKENS:
        raise NotServed(f"eager loops, only up to {MOST_TOKENS} tokens")
    if row.name == "train":
        return gradients(lambda q, k, v, g, beta: chunked(q, k, v, g=g, beta=beta), case)
    if row.name == "prefill":

        def prefill() -> object:
            q, k, v, g, beta = tokens_of(case)
            o, state = chunked(q, k, v, g=g, beta=beta, output_final_state=True)
            return o, state.mT

        return prefill
    slots = case.slots.long()
    function = recurrent if row.name == "decode" else chunked
    # Its cache has K-major states.
    cache = case.pool.mT.contiguous()

    def serve() -> object:
        q, k, v, g, beta = gated(case, normalise=True)
        states = cache[slots]
        o, state = function(q, k, v, g=g, beta=beta, initial_state=states, output_final_state=True)
        cache.index_copy_(0, slots, state.to(cache.dtype))
        return o, cache.mT

    return serve
