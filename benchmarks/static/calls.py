"""The calls whose kernels are watched, on tensors without memory, at the sizes of a model.

16 key heads, 32 value heads, ``V = 128``, keys and queries normalised in the kernel. 1000 tokens
fill no tile, so the code is that of every length.
"""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks.rows import HEADS, Heads, Row
from gdn_ops.kernels import (
    causal_conv1d,
    causal_conv1d_backward,
    chunk,
    chunk_backward,
    chunk_hopper,
    recurrent,
)

H, HV, K, V = HEADS.H, HEADS.HV, HEADS.K, HEADS.V
# As a rank of tensor parallelism has.
FEW = Heads(2, 4)
D, W = 2 * H * K + HV * V, 4
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def new(*size: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(size, dtype=dtype, device="meta")


def integers(*size: int) -> Tensor:
    return new(*size, dtype=torch.int32)


def states(N: int, dtype: torch.dtype = FP32, K: int = K, heads: Heads = HEADS) -> Tensor:
    return new(N, heads.HV, V, K, dtype=dtype)


def tokens(
    B: int,
    T: int,
    dtype: torch.dtype = BF16,
    K: int = K,
    beta: torch.dtype | None = None,
    heads: Heads = HEADS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``q k v g beta``; ``beta`` has the dtype of ``q`` unless said otherwise."""
    H, HV = heads.H, heads.HV
    q, k = (new(B, T, H, K, dtype=dtype) for _ in range(2))
    return (
        *(q, k, new(B, T, HV, V, dtype=dtype)),
        *(new(B, T, HV, dtype=FP32), new(B, T, HV, dtype=beta or dtype)),
    )


def decode(dtype: torch.dtype, K: int = K) -> None:
    inputs = tokens(16, 1, K=K)
    recurrent.recurrent_(*inputs, states(33, dtype, K), integers(16), use_qk_l2norm=True)


def verify(dtype: torch.dtype) -> None:
    slots = states(65, dtype), integers(16, 4), integers(16)
    recurrent.recurrent_(*tokens(16, 4), *slots, use_qk_l2norm=True)


def verify_once(dtype: torch.dtype) -> None:
    recurrent.recurrent_(*tokens(16, 4), states(33, dtype), integers(16), use_qk_l2norm=True)


def prefill(B: int, dtype: torch.dtype = BF16, K: int = K) -> None:
    chunk.chunk(*tokens(B, 1000, dtype, K), states(B, FP32, K), use_qk_l2norm=True)


def plainly(call: Callable[[], None]) -> None:
    """By the plain kernels, as compiled layers and other versions of Triton have them."""
    with mock.patch.object(chunk_hopper, "has_gluon", return_value=False):
        call()


def in_two_kernels(call: Callable[[], None]) -> None:
    """By prepare and scan, as calls that leave multiprocessors idle."""
    with mock.patch.object(chunk, "is_faster", return_value=False):
        call()


def prefill_segments() -> None:
    """Few heads, and tokens for several segments."""
    chunk.chunk(*tokens(1, 8200, heads=FEW), states(1, heads=FEW), use_qk_l2norm=True)


def prefill_early() -> None:
    """Two segments, if all heads forget."""
    chunk.chunk(*tokens(1, 16400), states(1, FP32))


def prefill_pool(N: int = 7, T: int = 1000, heads: Heads = HEADS) -> None:
    slots = (integers(N), new(N, dtype=torch.bool), integers(N + 1), integers(N))
    inputs = (*tokens(1, T, heads=heads), states(33, heads=heads))
    chunk.chunk_(*inputs, *slots, use_qk_l2norm=True)


def prefill_pointers() -> None:
    """Heads that do not start at multiples of 16 bytes, which descriptors need."""
    row = new(16, 1000, (2 * H + HV) * K + 2)
    q, k, v, _ = row.split([H * K, H * K, HV * V, 2], -1)
    q, k, v = (x.unflatten(-1, (-1, K)) for x in (q, k, v))
    chunk.chunk(q, k, v, *tokens(16, 1000)[3:])


def gradient(
    dtype: torch.dtype = BF16, K: int = K, B: int = 2, T: int = 1000, heads: Heads = HEADS
) -> None:
    initial, dfinal_state = (states(B, dtype, K, heads) for _ in range(2))
    inputs = (*tokens(B, T, dtype, K, heads=heads), initial, None)
    do = new(B, T, heads.HV, V, dtype=dtype)
    chunk_backward.chunk_backward(do, dfinal_state, *inputs, use_qk_l2norm=True)


def convolve() -> None:
    inputs = (new(2, 1000, D), new(D, W), new(D), new(2, D, W - 1), None)
    causal_conv1d.causal_conv1d(*inputs, activation="silu")


def convolve_step(T: int) -> None:
    inputs = (new(16, T, D), new(D, W), None, new(33, D, T + W - 2), integers(16))
    accepted = integers(16) if T > 1 else None
    causal_conv1d.causal_conv1d_(*inputs, accepted, activation="silu")


def convolve_gradient() -> None:
    x, state = new(2, 1000, D), new(2, D, W - 1)
    inputs = (x, state, x, new(D, W), new(D), state, None)
    causal_conv1d_backward.causal_conv1d_backward(*inputs, activation="silu")


# Of the same kernel with the same flags and tiles the first name stands.
CALLS: dict[str, Callable[[], None]] = {
    "decode K=128, fp32 state": lambda: decode(FP32),
    "decode K=128, bf16 state": lambda: decode(BF16),
    "decode K=128, fp16 state": lambda: decode(FP16),
    "decode K=64, bf16 state": lambda: decode(BF16, 64),
    "decode K=256, bf16 state": lambda: decode(BF16, 256),
    "verify K=128, fp32 state": lambda: verify(FP32),
    "verify K=128, bf16 state": lambda: verify(BF16),
    "verify with one write K=128, fp32 state": lambda: verify_once(FP32),
    "verify with one write K=128, bf16 state": lambda: verify_once(BF16),
    "prefill K=128, bf16": lambda: prefill(16),
    "prefill K=128, bf16, one sequence": lambda: prefill(1),
    "prefill K=128, bf16, segments": prefill_segments,
    "prefill K=128, bf16, segments, packed, pool": lambda: prefill_pool(2, 8200, FEW),
    "prefill K=128, bf16, two segments": prefill_early,
    "prefill K=128, bf16, pointers": prefill_pointers,
    "prefill K=128, bf16, packed, pool": prefill_pool,
    "prefill K=128, bf16, two kernels": lambda: in_two_kernels(lambda: prefill(16)),
    "prefill K=128, bf16, packed, pool, two kernels": lambda: in_two_kernels(prefill_pool),
    "prefill K=128, bf16, plain": lambda: plainly(lambda: prefill(16)),
    "prefill K=128, bf16, one sequence, plain": lambda: plainly(lambda: prefill(1)),
    "prefill K=128, bf16, segments, plain": lambda: plainly(prefill_segments),
    "prefill K=128, bf16, packed, pool, plain": lambda: plainly(prefill_pool),
    "prefill K=128, fp16": lambda: prefill(16, FP16),
    "prefill K=128, fp32": lambda: prefill(16, FP32),
    "prefill K=32, bf16": lambda: prefill(16, K=32),
    "prefill K=64, bf16": lambda: prefill(16, K=64),
    "prefill K=256, bf16": lambda: prefill(16, K=256),
    "gradient K=128, bf16": gradient,
    "gradient K=128, bf16, many sequences": lambda: gradient(B=16),
    # If all heads forget.
    "gradient K=128, bf16, two segments": lambda: gradient(B=1, T=2100, heads=Heads(8, 16)),
    "gradient K=128, bf16, plain": lambda: plainly(gradient),
    "gradient K=128, fp32": lambda: gradient(FP32),
    "gradient K=64, bf16": lambda: gradient(K=64),
    "gradient K=256, bf16": lambda: gradient(K=256),
    "convolution bf16": convolve,
    "convolution bf16, one token": lambda: convolve_step(1),
    "convolution bf16, 4 tokens": lambda: convolve_step(4),
    "gradient of convolution bf16": convolve_gradient,
}


def call_of_row(row: Row) -> Callable[[], None]:
    """The operators of a measured row, as benchmarks/ours.py calls them."""

    def call() -> None:
        inputs = tokens(row.N, row.T, beta=FP32, heads=row.heads)
        if row.name == "decode":
            recurrent.recurrent_(*inputs, states(row.N, row.state_dtype), integers(row.N))
        elif row.name == "verify":
            slots = integers(row.N, row.T), integers(row.N)
            recurrent.recurrent_(*inputs, states(row.N * row.T, row.state_dtype), *slots)
        elif row.name == "verify_once":
            recurrent.recurrent_(*inputs, states(row.N, row.state_dtype), integers(row.N))
        else:
            chunk.chunk(*inputs)
            if row.name == "train":
                chunk_backward.chunk_backward(new(row.N, row.T, HV, V), None, *inputs)

    return call
