"""The operators of this package, as they are called eagerly and under ``torch.compile``."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import gdn_ops
from benchmarks.cases import Case, split_heads
from benchmarks.contender import Call, gradients, tokens_of
from benchmarks.rows import ONE_STEP, Row

NAME = "gdn_ops"
# The same with the gates, in rows of one step.
WITH_GATES = "gdn_ops with gates"
# The same without torch.compile, in rows of layers and models, where ours is compiled.
EAGER = "gdn_ops eager"
PACKAGE = "gdn-ops"


def state_arguments(row: Row, case: Case) -> tuple[Tensor, ...]:
    """The pool, and how the row's sequences find their states in it."""
    if row.name == "verify":
        return case.pool, case.table, case.accepted
    return case.pool, case.slots


def make_call(row: Row, case: Case) -> Call:
    """A call of the operator: gates and l2 norm are applied already."""
    if row.name == "train":
        return gradients(gdn_ops.chunk, case)
    if row.name == "prefill":
        return lambda: gdn_ops.chunk(*tokens_of(case))
    if row.name in ONE_STEP:
        states = state_arguments(row, case)
        return lambda: gdn_ops.recurrent_(*tokens_of(case), *states)
    return make_call_with_gates(row, case)


def serving(
    operator: Callable[..., Tensor],
    heads: tuple[int, int, int, int],
    qkv: Tensor,
    gates: tuple[Tensor, Tensor, Tensor, Tensor],
    *states: Tensor,
) -> Tensor:
    """What a layer computes between its convolution and its gated norm."""
    tokens = split_heads(qkv, *heads)
    a, b, A_log, dt_bias = gates
    g, beta = gdn_ops.gdn_gate(a, A_log, dt_bias), b.float().sigmoid()
    return operator(*tokens, g, beta, *states, use_qk_l2norm=True)


@functools.cache
def compiled(backend: str) -> Callable[..., Tensor]:
    """``serving``, compiled: on a GPU the operator's kernels, and of a prefill those of gates."""
    # One code serves all rows of an operator, but each kind of row is compiled for itself.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(serving, fullgraph=True, backend=backend)


def make_call_with_gates(row: Row, case: Case) -> Call:
    """A call from what a convolution leaves and from raw gates, as a compiled layer makes it.

    As in a model that is served, sizes of heads and the tokens of a step are fixed; the batch and
    the tokens of a prefill are not.
    """
    operator = gdn_ops.recurrent_ if row.name in ONE_STEP else gdn_ops.chunk_
    function = compiled("inductor" if case.pool.is_cuda else "aot_eager")
    gates = case.a, case.b, case.A_log, case.dt_bias
    states = state_arguments(row, case)
    heads = *case.q.shape[2:], *case.v.shape[2:]
    for x in (case.qkv, case.a, case.b):
        _make_dynamic(x, 0)
        if row.name in ONE_STEP:
            torch._dynamo.mark_static(x, 1)
        else:
            _make_dynamic(x, 1)
    for x in states:
        _make_dynamic(x, 0)
    return lambda: function(operator, heads, case.qkv, gates, *states)


def _make_dynamic(x: Tensor, dim: int) -> None:
    """What is one is always compiled for one."""
    if x.shape[dim] > 1:
        torch._dynamo.mark_dynamic(x, dim)
