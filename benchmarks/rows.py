"""The rows of the suite on a GPU: their names, their shapes, the least that they must move."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Heads:
    """Heads and their sizes; the defaults are those of Qwen3-Next."""

    H: int = 16
    HV: int = 32
    K: int = 128
    V: int = 128


HEADS = Heads()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Rows whose peers have the gates and the l2 norm inside; ours is measured without them and with.
ONE_STEP = ("decode", "verify", "verify_once")
# Rows of one operator: what these say of bytes, inputs and peers holds for no other row.
OPERATORS = (*ONE_STEP, "prefill", "prefill_serving", "train")
# Rows of two kernels that differ in nothing but the layout of a state.
LAYOUTS = ("layout", "layout_scan")
# Rows of code of transformers: a whole layer, and a small model.
MODELS = ("layer", "model")
# Tokens of a chunk where a row depends on it.
CHUNK = 64


@dataclass(frozen=True)
class Row:
    """One measurement: ``N`` sequences of ``T`` tokens each, states of the dtype ``state``.

    With the heads that one of so many ``ranks`` of tensor parallelism has.
    """

    name: str
    N: int
    T: int
    state: str = "fp32"
    ranks: int = 1

    def __str__(self) -> str:
        of_ranks = f" tp{self.ranks}" if self.ranks > 1 else ""
        return f"{self.name} {self.T}x{self.N} {self.state}{of_ranks}"

    @property
    def heads(self) -> Heads:
        return Heads(HEADS.H // self.ranks, HEADS.HV // self.ranks)

    @property
    def state_dtype(self) -> torch.dtype:
        return DTYPES[self.state]

    @property
    def writes(self) -> int:
        """States that a sequence writes."""
        return self.T if self.name == "verify" else 1


BATCHES = (1, 16, 64, 256, 1024)
STEPS = ((16, 4), (64, 2), (64, 4), (64, 8), (256, 4))
PREFILLS = ((1, 512), (1, 2048), (1, 8192), (1, 32768), (4, 2048), (8, 1024), (4, 8192))

ROWS = (
    *(Row("decode", N, 1, state) for state in DTYPES for N in BATCHES),
    *(Row("verify", N, T, state) for state in DTYPES for N, T in STEPS),
    *(Row("verify_once", N, T, state) for state in DTYPES for N, T in STEPS),
    *(Row("prefill", N, T) for N, T in PREFILLS),
    *(Row("prefill", 1, T, ranks=ranks) for ranks in (2, 4, 8) for T in (8192, 32768)),
    *(Row("prefill_serving", N, T) for N, T in PREFILLS),
    *(Row("train", N, T) for N, T in ((1, 8192), (1, 32768), (4, 8192))),
    *(Row("layout", N, 1, state) for state in DTYPES for N in BATCHES),
    *(Row("layout_scan", N, 4 * CHUNK) for N in BATCHES),
    *(Row(name, N, T) for name in MODELS for N, T in ((1, 1), (64, 1), (1, 2048))),
)

# Measured first, so that a run that is cut short has them.
HEADLINE = (
    Row("decode", 64, 1),
    Row("prefill", 1, 8192),
    Row("prefill", 4, 8192),
    Row("decode", 1024, 1, "bf16"),
    Row("verify", 64, 4),
    Row("verify_once", 64, 4),
    Row("prefill_serving", 1, 8192),
    Row("train", 1, 8192),
    Row("decode", 1, 1),
)


def parse(text: str) -> Row:
    """The row that ``str`` writes so: ``decode 1x64 fp32``, ``prefill 8192x1 fp32 tp8``."""
    name, shape, state, *ranks = text.split()
    T, N = shape.split("x")
    return Row(name, int(N), int(T), state, *(int(x.removeprefix("tp")) for x in ranks))


def chosen(names: list[str] | None) -> list[Row]:
    """The rows of these names (all where None), headline rows first.

    A name is that of several rows, ``prefill``, or of one, ``prefill 8192x1 fp32``.

    Raises:
        ValueError: a name that no row has.
    """
    known = dict.fromkeys(row.name for row in ROWS)
    for name in names or ():
        if name not in known and name not in map(str, ROWS):
            raise ValueError(f"rows: {name} must be one of {', '.join(known)}")
    rows = dict.fromkeys((*HEADLINE, *ROWS))
    return [row for row in rows if names is None or row.name in names or str(row) in names]


def bytes_moved(row: Row) -> int:
    """The least traffic: tokens and outputs once, a state read once, written where it must be.

    A training step reads its tokens three times: forward, again for the backward, and gradients of
    their size. Its states stay on the chip, as do those that a functional prefill starts from. Each
    token of a scan comes with a row of a matrix instead of ``beta``.
    """
    heads = row.heads
    H, HV, K, V = heads.H, heads.HV, heads.K, heads.V
    token = (2 * H * K + 2 * HV * V) * 2 + 2 * HV * 4
    if row.name == "layout_scan":
        token += HV * CHUNK * 2 - HV * 4
    states = {"prefill": 1, "train": 0}.get(row.name, 1 + row.writes)
    passes = 3 if row.name == "train" else 1
    return row.N * (row.T * token * passes + states * HV * V * K * row.state_dtype.itemsize)


def operations(row: Row) -> int:
    """Floating-point operations of the token-by-token form: the least that computes the row.

    ``S k``, ``S q`` and ``u k^T`` for each token and value head; a training step has six products
    of that size more, and computes no state again.
    """
    heads = row.heads
    return (18 if row.name == "train" else 6) * heads.K * heads.V * heads.HV * row.N * row.T
