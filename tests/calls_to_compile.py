"""Calls of the operators on tensors without memory, whose kernels are compiled for any GPU."""

import torch
from launches_to_compile import HV, H, K, V, integers, new, states, tokens

from benchmarks.static.calls import in_two_kernels, plainly
from gdn_ops.kernels import causal_conv1d as conv
from gdn_ops.kernels import causal_conv1d_backward as conv_backward
from gdn_ops.kernels import chunk, chunk_backward, recurrent

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
D, W = 8192, 4


def decode(dtype, K=K, is_kda=False):
    pool = states(33, dtype, K)
    inputs = tokens(16, 1, K=K, is_kda=is_kda)
    recurrent.recurrent_(*inputs, pool, integers(16), use_qk_l2norm=True)


def verify(dtype, exact=False):
    pool, table, accepted = states(65, dtype), integers(16, 4), integers(16)
    inputs = tokens(16, 4)
    recurrent.recurrent_(*inputs, pool, table, accepted, use_qk_l2norm=True, exact=exact)


def verify_once(dtype, T, is_packed=False):
    """One write of the state: a table would ask for one after each token."""
    inputs, bounds = (tokens(1, 16 * T), integers(17)) if is_packed else (tokens(16, T), None)
    slots = (integers(16), None, bounds)
    recurrent.recurrent_(*inputs, states(33, dtype), *slots, use_qk_l2norm=True)


def packed(dtype):
    recurrent.recurrent(*tokens(1, 100), states(7, dtype), integers(8))


def packed_pool(dtype):
    recurrent.recurrent_(
        *tokens(1, 700), states(33, dtype), integers(7), None, integers(8), integers(7)
    )


def prefill(B, dtype=BF16, K=K, l2norm=True):
    initial = states(B, FP32, K)
    chunk.chunk(*tokens(B, 1000, dtype, K), initial, use_qk_l2norm=l2norm)


def prefill_pool():
    slots = (integers(7), new(7, dtype=torch.bool), integers(8), integers(7))
    chunk.chunk_(*tokens(1, 1000), states(33), *slots, use_qk_l2norm=True)


def prefill_segments(is_packed=False):
    """Few heads, as a rank of tensor parallelism has, and tokens for several segments."""
    q, k, v = new(1, 8200, 2, K), new(1, 8200, 2, K), new(1, 8200, 4, V)
    gates = (new(1, 8200, 4, dtype=FP32), new(1, 8200, 4))
    pool, slots = new(9, 4, V, K, dtype=FP32), integers(1)
    if is_packed:
        flags = (new(1, dtype=torch.bool), integers(2), integers(1))
        chunk.chunk_(q, k, v, *gates, pool, slots, *flags, use_qk_l2norm=True)
    else:
        chunk.chunk(q, k, v, *gates, pool[:1])


def prefill_slices():
    """Heads that do not start at multiples of 16 bytes, which descriptors need."""
    row = new(16, 1000, (2 * H + HV) * K + 2)
    q, k, v, _ = row.split([H * K, H * K, HV * V, 2], -1)
    q, k, v = (x.unflatten(-1, (-1, K)) for x in (q, k, v))
    chunk.chunk(q, k, v, *tokens(16, 1000)[3:])


def gradient(dtype=BF16, K=K, l2norm=True, is_packed=False):
    B, N = (1, 7) if is_packed else (2, 2)
    inputs = (*tokens(B, 1000, dtype, K), states(N, dtype, K))
    bounds = integers(N + 1) if is_packed else None
    do, dfinal_state = new(B, 1000, HV, V, dtype=dtype), states(N, dtype, K)
    chunk_backward.chunk_backward(do, dfinal_state, *inputs, bounds, use_qk_l2norm=l2norm)


def convolve(*, dtype=BF16, is_channel_major=False, is_packed=False):
    B = 1 if is_packed else 2
    x = new(B, D, 1000, dtype=dtype).mT if is_channel_major else new(B, 1000, D, dtype=dtype)
    bounds = integers(8) if is_packed else None
    initial = new(7 if is_packed else B, D, W - 1, dtype=dtype)
    conv.causal_conv1d(x, new(D, W), new(D), initial, bounds, activation="silu")


def convolve_step(T, is_wide=True):
    pool = new(33, D, T + W - 2) if is_wide else new(33, T + W - 2, D).mT
    accepted = integers(16) if T > 1 else None
    conv.causal_conv1d_(
        new(16, T, D), new(D, W), None, pool, integers(16), accepted, activation="silu"
    )


def convolve_gradient(*, is_packed=False):
    B, N = (1, 7) if is_packed else (2, 2)
    x, state = new(B, 1000, D), new(N, D, W - 1)
    bounds = integers(N + 1) if is_packed else None
    conv_backward.causal_conv1d_backward(
        x, state, x, new(D, W), new(D), state, bounds, activation="silu"
    )


CALLS = {
    "decode fp32": lambda: decode(FP32),
    "decode bf16": lambda: decode(BF16),
    "decode fp16": lambda: decode(FP16),
    "decode KDA": lambda: decode(FP32, is_kda=True),
    "decode K=256": lambda: decode(BF16, 256),
    "verify": lambda: verify(BF16),
    "verify exact": lambda: verify(BF16, exact=True),
    "verify once fp32": lambda: verify_once(FP32, 8),
    "verify once bf16": lambda: verify_once(BF16, 8),
    "verify once packed": lambda: verify_once(BF16, 4, is_packed=True),
    "packed": lambda: packed(FP32),
    "packed pool": lambda: packed_pool(BF16),
    "prefill": lambda: prefill(16),
    "prefill of one": lambda: prefill(1),
    "prefill without norm": lambda: prefill(16, l2norm=False),
    "prefill in two kernels": lambda: in_two_kernels(lambda: prefill(16)),
    "prefill in two kernels without norm": lambda: in_two_kernels(
        lambda: prefill(16, l2norm=False)
    ),
    "prefill in two kernels pool": lambda: in_two_kernels(prefill_pool),
    "prefill fp16": lambda: prefill(16, FP16),
    "prefill plain": lambda: plainly(lambda: prefill(16)),
    "prefill plain of one": lambda: plainly(lambda: prefill(1)),
    "prefill plain without norm": lambda: plainly(lambda: prefill(16, l2norm=False)),
    "prefill plain pool": lambda: plainly(prefill_pool),
    "prefill plain segments": lambda: plainly(prefill_segments),
    "prefill K=32": lambda: prefill(16, K=32),
    "prefill K=64": lambda: prefill(16, K=64),
    "prefill K=256": lambda: prefill(16, K=256),
    "prefill fp32": lambda: prefill(16, FP32),
    "prefill pool": prefill_pool,
    "prefill segments": prefill_segments,
    "prefill segments packed": lambda: prefill_segments(is_packed=True),
    "prefill slices": prefill_slices,
    "gradient": lambda: gradient(),
    "gradient without norm": lambda: gradient(l2norm=False),
    "gradient K=64": lambda: gradient(K=64),
    "gradient K=256": lambda: gradient(K=256),
    "gradient fp32": lambda: gradient(FP32),
    "gradient packed": lambda: gradient(is_packed=True),
    "convolve": lambda: convolve(),
    "convolve channels": lambda: convolve(is_channel_major=True),
    "convolve packed": lambda: convolve(is_packed=True),
    "convolve token": lambda: convolve_step(1),
    "convolve token narrow": lambda: convolve_step(1, is_wide=False),
    "convolve verify": lambda: convolve_step(4),
    "convolve gradient": lambda: convolve_gradient(),
    "convolve gradient packed": lambda: convolve_gradient(is_packed=True),
}
