"""Prefill in one warp-specialised kernel for Hopper: matrices of chunks stay in shared memory.

    python -m benchmarks.probes.fused_prefill compile   without a GPU: registers, spills, memory
    python -m benchmarks.probes.fused_prefill check     with a float64 loop and torch.ops.gdn.chunk
    python -m benchmarks.probes.fused_prefill bench     medians in us beside torch.ops.gdn.chunk

A probe: written to see what is reachable, not part of the package, with Triton 3.6. A fault of a
barrier would hang: run it under ``timeout``.

A program serves one sequence and value head, in chunks of 64 tokens. With the log decay G cumulated
from the start of a chunk, D_ij = exp(G_i - G_j) for j <= i and else 0, of each chunk

    x = v - exp(G) k S^T                        A_ij    = beta_i D_ij <k_i, k_j> for j < i
    o = scale (exp(G) q S^T + weights x)        X       = (I + A)^-1
    S <- exp(G_last) S + (inverse x)^T k        inverse = diag(exp(G_last - G)) X diag(beta)
                                                weights = (D <q, k>) X diag(beta)

Roles: two math warp groups (``scan``) hold 64 rows of S each, in registers, and the first loads
tokens as well; an auxiliary one (``aux``, fused_prefill_aux.py) makes the matrices of chunks, up to
two ahead. 12 warps with 192, 192 and 120 registers a thread, 504 of 512; 44 bytes are spilled.
Shared memory is 219288 bytes: three stages of tokens and gates (148 KB), two of matrices (32 KB),
scratch of the auxiliary group (34 KB). An output takes the place of its values.

Measured on an H200, torch 2.11, Triton 3.6.0, 2026-11-29 and 30, us; 16 key heads, 32 value heads.
Where one role was timed alone, the other only signalled; that switch is not in this file.

                                    1x8192   4x2048   8x1024   4x8192
    fused                              465      125      130      495
    aux alone                          303       82       87      313
    math alone                         242       71       76      263
    two kernels, gdn.chunk             263      173      183      638

What limits it: the auxiliary group is a chain of dependent steps. By clocks that it writes, of 8765
cycles a chunk (7377 without the clocks) factors and inverses take 2254, products of tokens 1962,
stores and gates 1274, Newton's step 879; the math groups wait for it half of their time. With the
products of tokens before publishing, as here, for after it, 4 us less. One sequence, besides, is 32
programs for 132 multiprocessors. benchmarks/results/h200-2026-11-30.md has all variants.

Not served: l2 norm of q and k, initial states, packed rows, other sizes than K = V = 128, other
dtypes than bfloat16 tokens with float32 gates.

Names in kernels are those of fused_prefill_aux.py; ``d_`` is a descriptor.
"""

# ruff: noqa: TID253 -- a script, which nothing imports
import contextlib
import io
import re
import statistics
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared as fence
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma as wgmma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait as wgmma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks.probes.fused_prefill_aux import (
    BT,
    LOADED,
    NARROW,
    NM,
    NST,
    ROW,
    SA,
    SC,
    SL,
    SR,
    TOKENS,
    XA,
    XC,
    XL,
    aux,
)

# Registers of a thread of a math group and of the auxiliary one; three groups may have 512 in all.
R_MATH, R_AUX = gl.constexpr(192), gl.constexpr(120)
# Sequences, tokens, key heads, value heads: against the float64 loop; and sizes that are timed.
SMALL = ((2, 128, 2, 4), (2, 192, 2, 4), (1, 100, 2, 4), (3, 257, 2, 4), (2, 1, 1, 1))
LARGE = ((1, 8192), (4, 2048), (8, 1024), (4, 8192))
# Of the root of mean square: one and a half roundings to bfloat16, 2^-8 each.
ROUNDING = 6e-3


@gluon.jit
def load_tokens(tokens, full, descs, place, i):
    """Tokens of chunk ``i`` to their stage, by one thread."""
    _, s_halves, s_v = tokens
    d_q, d_k, d_v, _ = descs
    i_b, i_h, i_hv, _ = place
    st = i % NST
    bar = full.index(st)
    mbarrier.expect(bar, 3 * BT * 128 * 2)
    row = i * BT
    for h in gl.static_range(2):
        t_k = s_halves.index(4 * st + 2 * h)._reinterpret(gl.bfloat16, [1, BT, 64], LOADED)
        tma.async_copy_global_to_shared(d_k, [i_b, row, i_h * 128 + h * 64], bar, t_k)
        t_q = s_halves.index(4 * st + 2 * h + 1)._reinterpret(gl.bfloat16, [1, BT, 64], LOADED)
        tma.async_copy_global_to_shared(d_q, [i_b, row, i_h * 128 + h * 64], bar, t_q)
    for h in gl.static_range(2):
        t_v = s_v.index(2 * st + h)._reinterpret(gl.bfloat16, [1, BT, 64], LOADED)
        tma.async_copy_global_to_shared(d_v, [i_b, row, i_hv * 128 + h * 64], bar, t_v)


@gluon.jit
def scan(tokens, mats, gates, bars, descs, p_final, place, C: gl.constexpr):
    """One warp group: 64 rows of the state."""
    HV: gl.constexpr = C[0]
    SCALE: gl.constexpr = C[1]
    HALF: gl.constexpr = C[2]
    full, full_m, free_m = bars
    i_b, _, i_hv, T = place
    NT = (T + BT - 1) // BT
    b_zero = gl.zeros((64, BT), gl.float32, XL)
    b_S = gl.zeros((64, 128), gl.float32, SL)
    if HALF == 0:
        for i in range(gl.minimum(NST, NT)):
            load_tokens(tokens, full, descs, place, i)
    for i in range(NT):
        st, sm = i % NST, i % NM
        mbarrier.wait(full.index(st), (i // NST) & 1)
        t_k = tokens[0].index(st).slice(0, BT)
        t_q = tokens[0].index(st).slice(BT, BT)
        a_S = gl.convert_layout(b_S.to(gl.bfloat16), XA)
        # Rows of V; when they are read, the output takes their place.
        t_v = tokens[2].index(2 * st + HALF)
        t_decay, t_last = gates[0].index(st), gates[1].index(st)
        b_x = wgmma(a_S, t_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_o = wgmma(a_S, t_q.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_x, b_o = wgmma_wait(0, deps=(b_x, b_o))
        mbarrier.wait(full_m.index(sm), (i // NM) & 1)
        b_decay = t_decay.load(XC)
        b_v = t_v.permute((1, 0)).load(XL)
        b_x = b_x * (-b_decay)[None, :] + b_v.to(gl.float32)
        a_x = gl.convert_layout(b_x.to(gl.bfloat16), XA)
        b_u = wgmma(a_x, mats[0].index(sm), b_zero, use_acc=False, is_async=True)
        b_S = b_S * t_last.load(SR)[:, None]
        # Read once more, which takes fewer registers.
        b_o = b_o * t_decay.load(XC)[None, :]
        b_o = wgmma(a_x, mats[1].index(sm), b_o, is_async=True)
        b_u = wgmma_wait(1, deps=(b_u,))
        b_S = wgmma(gl.convert_layout(b_u.to(gl.bfloat16), SA), t_k, b_S, is_async=True)
        b_o = wgmma_wait(1, deps=(b_o,))
        # The output of the chunk before has been read from its stage.
        tma.store_wait(0)
        gl.thread_barrier()
        t_v.permute((1, 0)).store((b_o * SCALE).to(gl.bfloat16))
        fence()
        gl.thread_barrier()
        # Every warp is done with these matrices, and has left the chunk before.
        mbarrier.arrive(free_m.index(sm), count=1)
        t_o = t_v._reinterpret(gl.bfloat16, [1, BT, 64], LOADED)
        tma.async_copy_shared_to_global(descs[3], [i_b, i * BT, i_hv * 128 + HALF * 64], t_o)
        if HALF == 0 and i > 0 and i + NST - 1 < NT:
            # Both warp groups have left the chunk before: its stage is free.
            mbarrier.wait(free_m.index(sm), (i // NM) & 1)
            load_tokens(tokens, full, descs, place, i + NST - 1)
        b_S = wgmma_wait(0, deps=(b_S,))
    o_v = HALF * 64 + gl.arange(0, 64, layout=SR)
    o_k = gl.arange(0, 128, layout=SC)
    p_final += (i_b * HV + i_hv).to(gl.int64) * (128 * 128)
    gl.store(p_final + o_v[:, None] * 128 + o_k[None, :], b_S)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T"])
def fused_kernel(
    d_q, d_k, d_v, d_o, p_g, p_beta, p_final, T,
    SCALE: gl.constexpr, H: gl.constexpr, HV: gl.constexpr,
):  # fmt: skip
    """The grid is ``B * HV``; of the roles ``num_warps=4`` counts the first."""
    # The gates of a chunk ahead take the place of one that all have left.
    gl.static_assert(NST > NM)
    i_hv = gl.program_id(0) % HV
    i_b = gl.program_id(0) // HV
    place = (i_b, i_hv // (HV // H), i_hv, T)
    # Halves of 64 channels of keys and queries in turn, which together are one operand.
    s_halves = gl.allocate_shared_memory(gl.bfloat16, [4 * NST, BT, 64], TOKENS)
    s_kq = s_halves._reinterpret(gl.bfloat16, [NST, 2 * BT, 128], TOKENS)
    s_v = gl.allocate_shared_memory(gl.bfloat16, [2 * NST, BT, 64], TOKENS)
    s_inverse = gl.allocate_shared_memory(gl.bfloat16, [NM, BT, BT], NARROW)
    s_weights = gl.allocate_shared_memory(gl.bfloat16, [NM, BT, BT], NARROW)
    t_u = gl.allocate_shared_memory(gl.bfloat16, [BT, BT], NARROW)
    t_du = gl.allocate_shared_memory(gl.bfloat16, [BT, BT], NARROW)
    t_p = gl.allocate_shared_memory(gl.bfloat16, [BT, BT], NARROW)
    t_z = gl.allocate_shared_memory(gl.bfloat16, [BT, BT], NARROW)
    t_zd = gl.allocate_shared_memory(gl.bfloat16, [BT, 16], NARROW)
    s_decay = gl.allocate_shared_memory(gl.float32, [NST, BT], ROW)
    s_last = gl.allocate_shared_memory(gl.float32, [NST, BT], ROW)
    s_G = gl.allocate_shared_memory(gl.float32, [NST, BT], ROW)
    s_beta = gl.allocate_shared_memory(gl.float32, [NST, BT], ROW)
    s_tail = gl.allocate_shared_memory(gl.float32, [NST, BT], ROW)
    # Tokens have come; matrices are there; both math groups are done with matrices.
    full = gl.allocate_shared_memory(gl.int64, [NST, 1], mbarrier.MBarrierLayout())
    full_m = gl.allocate_shared_memory(gl.int64, [NM, 1], mbarrier.MBarrierLayout())
    free_m = gl.allocate_shared_memory(gl.int64, [NM, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(NST):
        mbarrier.init(full.index(s), count=1)
    for s in gl.static_range(NM):
        mbarrier.init(full_m.index(s), count=1)
        mbarrier.init(free_m.index(s), count=2)
    fence()
    gl.thread_barrier()
    tokens, mats, bars = (s_kq, s_halves, s_v), (s_inverse, s_weights), (full, full_m, free_m)
    gates, scratch = (s_decay, s_last, s_G, s_beta, s_tail), (t_u, t_du, t_p, t_z, t_zd)
    descs = (d_q, d_k, d_v, d_o)
    # Numbers reach a role as constants only within a tuple.
    LOW: gl.constexpr = (HV, SCALE, 0)
    HIGH: gl.constexpr = (HV, SCALE, 1)
    low = (tokens, mats, gates, bars, descs, p_final, place, LOW)
    high = (tokens, mats, gates, bars, descs, p_final, place, HIGH)
    matrices = (tokens, mats, gates, scratch, bars, p_g, p_beta, place, LOW)
    gl.warp_specialize([(scan, low), (scan, high), (aux, matrices)], [4, 4], [R_MATH, R_AUX])


def launch(q, k, v, g, beta, scale, o, final_state):
    """All tensors contiguous, checked by ``fused``."""
    B, T, H, _ = q.shape
    HV = v.shape[2]
    flat = (x.view(B, T, -1) for x in (q, k, v, o))
    descs = (TensorDescriptor.from_tensor(x, [1, BT.value, 64], LOADED.value) for x in flat)
    fused_kernel[(B * HV,)](*descs, g, beta, final_state, T, scale, H, HV, num_warps=4)
    return o, final_state


def fused(q, k, v, g, beta, scale=None):
    """``o`` and the final state ``[B, HV, V, K]``, as ``torch.ops.gdn.chunk`` has them."""
    (H, K), (HV, V) = q.shape[2:], v.shape[2:]
    if (K, V) != (128, 128):
        raise NotImplementedError(f"fused: K and V must be 128, got {K} and {V}")
    if HV % H:
        raise ValueError(f"fused: HV must be a multiple of H, got {HV} and {H}")
    for name, x in {"q": q, "k": k, "v": v, "g": g, "beta": beta}.items():
        dtype = torch.float32 if name in ("g", "beta") else torch.bfloat16
        if x.dtype != dtype:
            raise NotImplementedError(f"fused: {name} must be {dtype}, got {x.dtype}")
        if not x.is_contiguous() or x.shape[1] == 0:
            got = f"shape {tuple(x.shape)}, strides {x.stride()}"
            raise ValueError(f"fused: {name} must be contiguous and have tokens, got {got}")
    final_state = torch.empty(v.shape[0], HV, V, K, device=v.device)
    scale = K**-0.5 if scale is None else scale
    return launch(q, k, v, g, beta, scale, torch.empty_like(v), final_state)


def compile_only():
    """Registers, spills and shared memory of ``fused_kernel``, cross-compiled."""
    names = fused_kernel.arg_names
    types = dict.fromkeys(names, "*fp32") | {"T": "i32"}
    types |= dict.fromkeys(names[:4], f"tensordesc<bf16[1, 64, 64],{LOADED.value!r}>")
    constants = {"SCALE": 128**-0.5, "H": 16, "HV": 32}
    source = GluonASTSource(
        fn=fused_kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(x),): value for x, value in constants.items()},
        attrs={(names.index(x),): [["tt.divisibility", 16]] for x in ("p_g", "p_beta", "p_final")},
    )
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(log):
        # ptxas speaks only where nothing is cached.
        triton.knobs.cache.dir = folder
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
        )
    print(*re.findall(r"Used \d+ registers|\d+ bytes spill \w+", log.getvalue()), sep=", ", end="")
    print(f"; {R_MATH.value} and {R_AUX.value} by role; {compiled.metadata.shared} bytes shared")
    return compiled


def inputs(B, T, H, HV, seed=0):
    torch.manual_seed(seed)
    q, k = torch.nn.functional.normalize(torch.randn(2, B, T, H, 128, device="cuda"), dim=-1)
    v = torch.randn(B, T, HV, 128, device="cuda")
    g = torch.nn.functional.logsigmoid(torch.randn(B, T, HV, device="cuda")) / 16
    beta = torch.rand(B, T, HV, device="cuda")
    return q.bfloat16(), k.bfloat16(), v.bfloat16(), g, beta


def loop(q, k, v, g, beta, scale):
    """float64, a token after the other."""
    HV = v.shape[2]
    q, k = (x.double().repeat_interleave(HV // x.shape[2], 2) for x in (q, k))
    v, decay, beta = v.double(), g.double().exp(), beta.double()
    S = v.new_zeros(v.shape[0], HV, v.shape[3], k.shape[3])
    o = torch.zeros_like(v)
    for t in range(v.shape[1]):
        S = S * decay[:, t, :, None, None]
        x = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhvk,bhk->bhv", S, k[:, t]))
        S = S + x[..., None] * k[:, t, :, None, :]
        o[:, t] = scale * torch.einsum("bhvk,bhk->bhv", S, q[:, t])
    return o, S


def chunk(*tensors):
    return torch.ops.gdn.chunk(*tensors, None, None, scale=None, use_qk_l2norm=False)


def errors(result, true):
    """Of ``o`` and the state, root of mean square, relative; NaN where something is unwritten."""
    pairs = [(x.double(), y.double()) for x, y in zip(result, true, strict=True)]
    return [((x - y).norm() / y.norm()).item() for x, y in pairs]


def check():
    """Each launch into NaN; those of the sizes that are timed also repeated, bit for bit."""
    import gdn_ops  # noqa: F401 -- registers torch.ops.gdn

    wrong = 0
    for B, T, H, HV in (*SMALL, *((B, T, 16, 32) for B, T in LARGE)):
        tensors = inputs(B, T, H, HV, seed=T)
        theirs, large = chunk(*tensors), H == 16
        true = theirs if large else loop(*tensors, 128**-0.5)
        runs = []
        for _ in range(10 if large else 2):
            o, S = (torch.full_like(x, float("nan")) for x in theirs)
            runs.append(launch(*tensors, 128**-0.5, o, S))
        ours, limits = errors(runs[0], true), [max(2 * e, ROUNDING) for e in errors(theirs, true)]
        same = all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0], strict=True))
        fine = same and all(e < limit for e, limit in zip(ours, limits, strict=True))
        wrong += not fine
        print(
            f"{B}x{T} {H}/{HV} heads, to {'gdn.chunk' if large else 'float64'}:"
            f" o {ours[0]:.1e}, state {ours[1]:.1e}, limits {limits[0]:.1e}, {limits[1]:.1e},"
            f" {'repeats' if same else 'DIFFERS FROM RUN TO RUN'}, {'ok' if fine else 'WRONG'}"
        )
    sys.exit(wrong > 0)


def graph_of(call, n):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(n):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def medians(calls, n=10, rounds=15):
    """Microseconds of each call, from graphs of ``n`` of it, in turn."""
    graphs = [graph_of(call, n) for call in calls]
    times = [[] for _ in calls]
    for _ in range(rounds):
        for graph, of_graph in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            of_graph.append(1e3 * start.elapsed_time(end) / n)
    return [statistics.median(x) for x in times]


def bench():
    import gdn_ops  # noqa: F401 -- registers torch.ops.gdn

    for B, T in LARGE:
        tensors = inputs(B, T, 16, 32)
        if not all(e < ROUNDING for e in errors(fused(*tensors), chunk(*tensors))):
            print(f"{B}x{T}: WRONG, not timed")
            continue
        ours, theirs = medians([lambda x=tensors: fused(*x), lambda x=tensors: chunk(*x)])
        print(f"{B}x{T}: fused {ours:.1f}, gdn.chunk {theirs:.1f}")


if __name__ == "__main__":
    modes = {"compile": compile_only, "check": check, "bench": bench}
    modes.get(sys.argv[-1], lambda: print(__doc__))()
