"""The answer of a row in float64, token by token, and the errors of a contender against it."""

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contender import Call, tokens_of
from benchmarks.rows import Row


def delta_rule(tokens: list[Tensor], S: Tensor) -> tuple[Tensor, Tensor]:
    """``o [N, T, HV, V]`` and the state after each token, ``[N, T, HV, V, K]``."""
    q, k, v, g, beta = tokens
    repeats = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(repeats, 2) for x in (q, k))
    outputs, states = [], []
    for t in range(v.shape[1]):
        S = g[:, t, :, None, None].exp() * S
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("nhvk,nhk->nhv", S, k[:, t]))
        S = S + u[..., :, None] * k[:, t, :, None, :]
        outputs.append(torch.einsum("nhvk,nhk->nhv", S, q[:, t]) * k.shape[-1] ** -0.5)
        states.append(S)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def with_gates(case: Case) -> list[Tensor]:
    """``q k v g beta`` in float64 from the raw inputs."""
    q, k, v = (x.double() for x in case.raw)
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    a = torch.nn.functional.softplus(case.a.double() + case.dt_bias.double())
    return [q, k, v, -case.A_log.double().exp() * a, case.b.double().sigmoid()]


def answer(row: Row, case: Case, gates: bool) -> dict[str, Tensor]:
    """Every result of the row by name; of a pool, the slots to be written and all the others."""
    tokens = with_gates(case) if gates else [x.double() for x in tokens_of(case)]
    N, _, HV, V = case.v.shape
    zeros = tokens[2].new_zeros(N, HV, V, case.q.shape[-1])
    if row.name == "train":
        leaves = [x.requires_grad_() for x in tokens]
        o, _ = delta_rule(leaves, zeros)
        found = torch.autograd.grad(o, leaves, case.do.double())
        return dict(zip(("dq", "dk", "dv", "dg", "dbeta"), found, strict=True))
    if row.name == "prefill":
        o, states = delta_rule(tokens, zeros)
        return {"o": o, "final_state": states[:, -1]}
    pool = case.pool.double()
    read = case.read if row.name == "verify" else case.slots
    o, states = delta_rule(tokens, pool[read.long()])
    if row.name == "verify":
        pool[case.table.long()] = states
    else:
        pool[case.slots.long()] = states[:, -1]
    return {"o": o, **in_pool(row, case, pool)}


def in_pool(row: Row, case: Case, pool: Tensor) -> dict[str, Tensor]:
    """The slots that the row writes, and the others, which must stay as they are."""
    written = (case.table if row.name == "verify" else case.slots).long().flatten()
    others = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
    others[written] = False
    return {"state": pool[written], "elsewhere": pool[others]}


def results(row: Row, case: Case, call: Call) -> dict[str, Tensor]:
    """What the call returned and wrote, under the same names."""
    found = call()
    if row.name == "train":
        return dict(zip(("dq", "dk", "dv", "dg", "dbeta"), found, strict=True))  # type: ignore[call-overload]
    if row.name == "prefill":
        return dict(zip(("o", "final_state"), found, strict=True))  # type: ignore[call-overload]
    o, pool = found if isinstance(found, tuple) else (found, case.pool)
    return {"o": o, **in_pool(row, case, pool)}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each result, in the norm over all its numbers."""
    relative = {}
    for name, y in exact.items():
        x = found[name].reshape(y.shape).double()
        relative[name] = ((x - y).norm() / y.norm()).item()
    return relative


def bound(name: str) -> float:
    """The error that bfloat16 allows.

    A result may be off by two roundings to bfloat16: of what the products are given, and of what
    is stored. A gradient passes through both the forward's products and the backward's. A slot that
    is not written keeps its bits.
    """
    if name == "elsewhere":
        return 0
    roundings = 4 if name.startswith("d") else 2
    return roundings * torch.finfo(torch.bfloat16).eps
