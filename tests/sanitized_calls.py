"""Every operator and its gradient once more, for NVIDIA's compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python tests/sanitized_calls.py

Results are not compared here, the tests of the operators do that: the sanitizer sees what no result
shows, accesses outside of a tensor, shared memory without a barrier between its writer and its
reader, memory that is read before it is written. Lengths are ragged, packed ones include an empty
sequence, and pools have slots that no sequence names. With ``--pointers`` no kernel uses tensor
descriptors: initcheck does not see what they write. With ``--two-kernels`` no prefill is in one,
and no backward has roles: racecheck does not see what orders them, which
tests/test_fused_protocol.py and tests/test_backward_protocol.py check.
"""

import itertools
import sys
from unittest import mock

import torch
from inputs import cu_seqlens, indices, make_convolution, make_inputs, make_state

import gdn_ops
from gdn_ops.kernels import chunk, chunk_backward, chunk_backward_hopper
from gdn_ops.kernels.chunk_hopper import serves
from gdn_ops.kernels.chunk_segments import Split
from gdn_ops.kernels.configs import gpu_at

LENGTHS = (33, 0, 70)
# Heads of a model, which tensor cores and descriptors serve; and odd ones, which they do not.
SIZES = ((2, 4, 128, 128), (1, 3, 24, 40))


def delta_rule(dtype, packed, sizes):
    """Prefill, decode and verify on pools, and the gradients of prefill."""
    _, HV, K, V = sizes
    N = len(LENGTHS)
    shape = (1, sum(LENGTHS) + 5) if packed else (N, 100)
    bounds = cu_seqlens(LENGTHS, device="cuda") if packed else None
    tokens = make_inputs(*shape, *sizes, dtype, device="cuda")
    state = make_state(N, HV, V, K, device="cuda")
    pool = make_state(4 * N + 1, HV, V, K, dtype, device="cuda")
    slots = indices([4, -1, 2], device="cuda")
    table = indices(range(4 * N), device="cuda").view(N, 4)
    options = {"use_qk_l2norm": packed}
    gdn_ops.chunk_(*tokens, pool, slots, cu_seqlens=bounds, **options)
    gdn_ops.recurrent(*tokens, state, bounds, **options)
    step = tokens.rows(slice(None), slice(0, 1 if packed else 4))
    if packed:
        gdn_ops.recurrent_(*step, pool, slots[:1], **options)
    else:
        accepted = indices([1, 4, 2], device="cuda")
        gdn_ops.recurrent_(*step, pool, table, accepted, **options)
    leaves = [x.requires_grad_() for x in (*tokens, state)]
    o, final_state = gdn_ops.chunk(*leaves, bounds, **options)
    torch.autograd.grad([o.float().sum(), final_state.sum()], leaves)


def segments(dtype, packed, sizes):
    """What is split, into segments of one chunk: a prefill on a pool, and one of heads that forget,
    with its gradient."""
    _, HV, K, V = sizes
    shape = (1, 205) if packed else (2, 150)
    bounds = cu_seqlens((130, 70), device="cuda") if packed else None
    tokens = make_inputs(*shape, *sizes, dtype, device="cuda")
    pool = make_state(5, HV, V, K, device="cuda")
    slots = indices([4, 2], device="cuda")
    with mock.patch.object(chunk, "choose", return_value=Split(1000, 1)):
        chunk.chunk_(*tokens, pool, slots, cu_seqlens=bounds, use_qk_l2norm=packed)
    if packed:
        return
    tokens, state = tokens._replace(g=tokens.g - 1), make_state(2, HV, V, K, device="cuda")
    split = Split(1000, 1, has_maps=False)
    with mock.patch.object(chunk, "choose", return_value=split):
        o, final_state = chunk.chunk(*tokens, state)
    with mock.patch.object(chunk_backward_hopper, "pick_split", return_value=split):
        chunk_backward.chunk_backward(o, final_state, *tokens, state)


def of_long_sequences_and_many(dtype, packed, sizes):
    """A prefill on a pool in one kernel, as where sequences fill the GPU, and with chunks that are
    prepared beside the scan, as of one sequence."""
    _, HV, K, V = sizes
    if not serves(K, V, gpu_at(0)) or dtype != torch.bfloat16:
        return
    shape = (1, sum(LENGTHS) + 165) if packed else (len(LENGTHS), 260)
    lengths = (*LENGTHS[:-1], LENGTHS[-1] + 160)
    bounds = cu_seqlens(lengths, device="cuda") if packed else None
    tokens = make_inputs(*shape, *sizes, dtype, device="cuda")
    pool = make_state(5, HV, V, K, device="cuda")
    slots = indices([4, -1, 2], device="cuda")
    for is_one, limit in ((True, 0), (False, 8)):
        with (
            mock.patch.object(chunk, "is_faster", return_value=is_one),
            mock.patch.object(chunk, "pick_limit", return_value=limit),
        ):
            chunk.chunk_(*tokens, pool, slots, cu_seqlens=bounds, use_qk_l2norm=packed)


def convolution(dtype, packed, D):
    """Whole sequences and their gradients, then the next tokens on a pool."""
    N, W = len(LENGTHS), 4
    shape = (1, sum(LENGTHS) + 5) if packed else (N, 100)
    bounds = cu_seqlens(LENGTHS, device="cuda") if packed else None
    x, weight, bias = make_convolution(*shape, D, W, dtype, device="cuda")
    history = torch.zeros(N, D, W - 1, device="cuda", dtype=dtype)
    leaves = [x.requires_grad_() for x in (x, weight, bias, history)]
    y, _ = gdn_ops.causal_conv1d(*leaves, bounds, activation="silu")
    torch.autograd.grad(y.float().sum(), leaves)
    if not packed:
        pool = torch.zeros(9, D, W - 1 + 3, device="cuda", dtype=dtype)
        slots, accepted = indices([4, -1, 2], device="cuda"), indices([1, 4, 2], device="cuda")
        with torch.no_grad():
            gdn_ops.causal_conv1d_(x[:, :4], weight, bias, pool, slots, accepted)


def main(names, with_descriptors, with_fused):
    if not with_descriptors:
        chunk._gpu_at = lambda index: gpu_at(index)._replace(has_descriptors=False)
    if not with_fused:
        chunk_backward.serves_backward = lambda *_: False
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for name, packed in itertools.product(names or dtypes, (False, True)):
        for sizes in SIZES:
            delta_rule(dtypes[name], packed, sizes)
            segments(dtypes[name], packed, sizes)
            if with_fused:
                of_long_sequences_and_many(dtypes[name], packed, sizes)
        for D in (256, 42):
            convolution(dtypes[name], packed, D)
        torch.cuda.synchronize()
        print("called all with", name, "packed" if packed else "batches", flush=True)


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    main(names, "--pointers" not in sys.argv, "--two-kernels" not in sys.argv)
