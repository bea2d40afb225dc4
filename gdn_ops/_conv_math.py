"""The causal convolution of a block of sequences as multiply-adds, and its argument checks."""

import torch
from torch import Tensor

from ._checks import (
    INPUT_DTYPES,
    arithmetic_dtype,
    check_devices,
    check_dtype,
    check_not_empty,
    check_packing,
    check_rank,
    check_shape,
    holds,
    state_dtypes,
)
from ._sequences import Block, as_index

_ACTIVATIONS = (None, "silu")

# Tokens are convolved in pieces of about this size, which stay in the cache for the W passes over
# them.
_PIECE_BYTES = 1 << 20


def check_convolution(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> int:
    """Check the arguments that every form has; returns the number of sequences."""
    check_rank(op, "x", x, "[B, T, D]")
    check_not_empty(op, "x", x, "[B, T, D]")
    check_dtype(op, "x", x, INPUT_DTYPES)
    D = x.shape[2]
    check_rank(op, "weight", weight, "[D, W]")
    W = weight.shape[1]
    check_shape(op, "weight", weight, "[D, W]", (D, W))
    if holds(W < 2):
        raise ValueError(f"{op}: weight must have W >= 2, got W = {W}")
    check_dtype(op, "weight", weight, (x.dtype, torch.float32))
    if bias is not None:
        check_shape(op, "bias", bias, "[D]", (D,))
        check_dtype(op, "bias", bias, (x.dtype, torch.float32))
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{op}: activation must be None or 'silu', got {activation!r}")
    N = check_packing(op, x, cu_seqlens, "x")
    named = {"x": x, "weight": weight, "bias": bias, "cu_seqlens": cu_seqlens}
    check_devices(op, "x", named)
    return N


def check_functional(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> int:
    N = check_convolution(op, x, weight, bias, cu_seqlens, activation)
    if initial_state is not None:
        shape = (N, x.shape[2], weight.shape[1] - 1)
        check_shape(op, "initial_state", initial_state, "[N, D, W - 1]", shape)
        check_dtype(op, "initial_state", initial_state, state_dtypes(x.dtype))
        check_devices(op, "x", {"x": x, "initial_state": initial_state})
    return N


def state_bytes(x: Tensor, W: int) -> int:
    """Size of the state of one sequence in the arithmetic dtype."""
    return int(x.shape[2] * W * arithmetic_dtype(x.dtype).itemsize)


def pieces(x: Tensor, block: Block) -> list[tuple[int, int]]:
    """First and last-plus-one token of each piece of a block."""
    token = len(block.ids) * x.shape[2] * arithmetic_dtype(x.dtype).itemsize
    step = max(16, _PIECE_BYTES // token) if x.device.type == "cpu" else block.length
    return [(t, min(t + step, block.length)) for t in range(0, block.length, step)]


def load_history(initial_state: Tensor | None, block: Block, x: Tensor, W: int) -> Tensor:
    """The ``W - 1`` inputs before the first, ``[n, W - 1, D]``, in the arithmetic dtype."""
    dtype = arithmetic_dtype(x.dtype)
    if initial_state is None:
        return x.new_zeros((len(block.ids), W - 1, x.shape[2]), dtype=dtype)
    return initial_state[as_index(block.ids, x.device)].mT.to(dtype)


def read_piece(x: Tensor, block: Block, history: Tensor, t0: int, t1: int) -> Tensor:
    """``[history | x]`` of tokens ``t0 .. t1 - 1``: ``[n, W - 1 + t1 - t0, D]``."""
    return torch.cat([history, block.read(x, t0, t1).to(history.dtype)], 1)


def preactivation(h: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """``bias + sum_j taps[j] * h[t + j]`` for ``h [n, W - 1 + L, D]`` and ``taps [W, D]``."""
    L = h.shape[1] - taps.shape[0] + 1
    z = h[:, :L] * taps[0]
    for j in range(1, taps.shape[0]):
        z.addcmul_(h[:, j : j + L], taps[j])
    return z if bias is None else z.add_(bias.to(z.dtype))


def convolve(
    x: Tensor,
    y: Tensor,
    block: Block,
    history: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> None:
    """Write the outputs of a block of sequences into ``y``."""
    W = weight.shape[1]
    taps = weight.to(history.dtype).mT.contiguous()
    for t0, t1 in pieces(x, block):
        h = read_piece(x, block, history, t0, t1)
        z = preactivation(h, taps, bias)
        block.write(y, t0, t1, z if activation is None else torch.nn.functional.silu(z))
        history = h[:, h.shape[1] - W + 1 :]


def last_inputs(x: Tensor, block: Block, history: Tensor, count: int) -> Tensor:
    """The last ``count`` rows of ``[history | x]``: ``[n, count, D]``, a new tensor."""
    L = block.length
    h = read_piece(x, block, history, max(0, L - count), L)
    return h[:, h.shape[1] - count :]
