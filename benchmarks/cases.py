"""Inputs of a row, made once and handed to every contender."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.rows import Heads, Row


def split_heads(qkv: Tensor, H: int, K: int, HV: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """``q k v`` as views of what a convolution leaves, ``[N, T, 2 * H * K + HV * V]``."""
    q, k, v = qkv.split((H * K, H * K, HV * V), dim=-1)
    return q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V))


@dataclass
class Case:
    """Tensors of one call. Contenders share them, so those that update the pool share that too.

    Tokens come twice, with the same ``v``. Normalised, with the gates applied: ``q k v g beta``.
    As a convolution leaves them, with raw gates: ``qkv`` (packed), ``a b A_log dt_bias``.
    """

    q: Tensor  # [N, T, H, K], unit
    k: Tensor  # [N, T, H, K], unit
    v: Tensor  # [N, T, HV, V]
    g: Tensor  # [N, T, HV], float32
    beta: Tensor  # [N, T, HV], float32
    qkv: Tensor  # [N, T, 2 * H * K + HV * V]
    a: Tensor  # [N, T, HV]
    b: Tensor  # [N, T, HV]
    A_log: Tensor  # [HV], float32
    dt_bias: Tensor  # [HV], float32
    do: Tensor  # [N, T, HV, V], the gradient of the output
    pool: Tensor  # [1 + N * writes + N, HV, V, K]; nothing uses slot 0, which is null for some
    slots: Tensor  # [N], int32: the state of each sequence, for calls that write one
    table: Tensor  # [N, writes], int32: a slot for the state after each token
    accepted: Tensor  # [N], int32: which of the table's slots a sequence starts from, from 1
    spare: Tensor  # [N], int32: slots with copies of the states that sequences start from
    cu_seqlens: Tensor  # [N + 1], int32

    @property
    def raw(self) -> tuple[Tensor, Tensor, Tensor]:
        """``q k v`` as views of ``qkv``."""
        return split_heads(self.qkv, *self.q.shape[2:], *self.v.shape[2:])

    @property
    def read(self) -> Tensor:
        """The slot that each sequence of a verify step starts from, ``[N]``."""
        return self.table.gather(1, self.accepted[:, None].long() - 1)[:, 0]


def make_case(row: Row, heads: Heads | None = None, device: str = "cuda") -> Case:
    """Random inputs: unit keys and queries, decays and states as a model has them."""
    heads = heads or row.heads
    H, HV, K, V = heads.H, heads.HV, heads.K, heads.V
    N, T = row.N, row.T

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device)

    q, k = torch.nn.functional.normalize(normal(2, N, T, H, K), dim=-1).bfloat16()
    v = normal(N, T, HV, V).bfloat16()
    g = torch.nn.functional.logsigmoid(normal(N, T, HV)) / 16
    beta = torch.rand(N, T, HV, device=device)
    raw = [normal(N, T, H * K).bfloat16(), normal(N, T, H * K).bfloat16(), v.reshape(N, T, HV * V)]
    # A in [1, 16] and a time step of 0.001 to 0.1, as checkpoints are initialised.
    time_step = 10 ** (-3 + 2 * torch.rand(HV, device=device))
    written = N * row.writes
    order = 1 + torch.randperm(written, device=device, dtype=torch.int32)
    case = Case(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        qkv=torch.cat(raw, -1),
        a=normal(N, T, HV).bfloat16(),
        b=normal(N, T, HV).bfloat16(),
        A_log=(1 + 15 * torch.rand(HV, device=device)).log(),
        dt_bias=time_step + torch.log(-torch.expm1(-time_step)),
        do=normal(N, T, HV, V).bfloat16(),
        pool=normal(1 + written + N, HV, V, K).mul_(0.1).to(row.state_dtype),
        slots=order[:N].clone(),
        table=order.view(N, row.writes),
        accepted=torch.randint(1, row.writes + 1, (N,), device=device, dtype=torch.int32),
        spare=1 + written + torch.arange(N, device=device, dtype=torch.int32),
        cu_seqlens=T * torch.arange(N + 1, device=device, dtype=torch.int32),
    )
    case.pool[case.spare.long()] = case.pool[case.read.long()]
    return case
