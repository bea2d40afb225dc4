"""The role of chunk_scan_hopper.py that holds the state: 64 of its rows, from chunk to chunk.

Products are asynchronous: those of S with keys and queries run together, and none waits for one
that it does not read. While they run, the output of the chunk before leaves.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.7 has another name for it.
group_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# Sums of products of a warp group, states [64, 128] and what is multiplied by them [64, 64]; as
# left operands; rows and columns.
SL, XL = (gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16])) for n in (128, 64))
SA, XA = (gl.constexpr(gl.DotOperandLayout(0, x, 2)) for x in (SL, XL))
SR, SC, XR, XC = (gl.constexpr(gl.SliceLayout(n, x)) for x in (SL, XL) for n in (1, 0))


@gluon.constexpr_function
def tile_layout(rank=2):
    """Of a tile of 16-bit numbers, as descriptors and products have it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


@gluon.jit
def plus(a, b):
    return a + b


@gluon.jit
def start_next():
    """The kernel after this one, where it was launched to begin when all programs here have."""
    asm: gl.constexpr = "griddepcontrol.launch_dependents; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(asm, "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_kernel_before():
    """Until what the kernel before has written is there, where this one began beside it."""
    asm: gl.constexpr = "griddepcontrol.wait; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(asm, "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_chunk(p_done):
    """Until it is prepared, and descriptors read what was written."""
    asm: gl.constexpr = """{
        .reg .pred p_again;
        .reg .b32 r_done;
        again:
        ld.acquire.gpu.global.b32 r_done, [$1];
        setp.eq.b32 p_again, r_done, 0;
        @p_again bra again;
        fence.proxy.async.global;
        mov.b32 $0, r_done;
        }"""
    address = p_done.to(gl.int64, bitcast=True)
    gl.inline_asm_elementwise(asm, "=r,l", [address], gl.int32, is_pure=False, pack=1)


@gluon.jit
def stage_output(b_od, b_out):
    """One chunk of the output ``[64, BT]`` in shared memory; a barrier of the group."""
    # Of the output before this one: its shared memory must have been read.
    tma.store_wait(0)
    group_barrier()
    b_out.permute((1, 0)).store(b_od)
    fence_async_shared()
    group_barrier()


@gluon.jit
def walk_chunks(
    tiles, bars, sources, read, write, i_v, i_skip, chunks, C: gl.constexpr, HALF: gl.constexpr
):
    """The role of a warp group: 64 rows of the state, from the first chunk to the last."""
    BT: gl.constexpr = C[0]
    STAGES: gl.constexpr = C[1]
    HALVES: gl.constexpr = C[2]
    ROWS: gl.constexpr = C[3]
    scale: gl.constexpr = C[4]
    HAS_STATE: gl.constexpr = C[5]
    READS_STATES: gl.constexpr = C[6]
    s_q, s_k, s_v, s_inverse, s_weights, s_decays, s_o = tiles
    p_o, stride_o, rows, i_own = sources[3]
    d_o = tma.make_tensor_descriptor(p_o, [rows, 128], [stride_o, 1], [BT, 64], tile_layout())
    full, free = bars
    DOT: gl.constexpr = s_k.dtype
    b_zero = gl.zeros((64, BT), gl.float32, XL)
    i_first = (i_v * HALVES + HALF) * 64
    o_v = i_first + gl.arange(0, 64, layout=SR)
    o_k = gl.arange(0, 128, layout=SC)
    b_S = gl.zeros((64, 128), gl.float32, SL)
    if READS_STATES:
        wait_for_kernel_before()
    if HAS_STATE:
        p_state, stride_v, stride_k, m_read = read
        p_state += o_v[:, None] * stride_v + o_k[None, :] * stride_k
        b_S = gl.load(p_state, m_read, 0.0).to(gl.float32)
    b_out = s_o.index(HALF)
    # The output of the chunk before, rounded: of a sum ptxas would have every product waited for.
    b_od = b_zero.to(DOT)
    for i in range(chunks):
        i_stage = i % STAGES
        mbarrier.wait(full.index(i_stage), (i // STAGES) & 1)
        b_k = s_k.index(i_stage)
        b_q = s_q.index(i_stage).permute((1, 0))
        b_inverse = s_inverse.index(i_stage).permute((1, 0))
        b_weights = s_weights.index(i_stage).permute((1, 0))
        t_v = s_v.index(HALVES * i_stage + HALF).permute((1, 0))
        t_decay = s_decays.index(ROWS * i_stage)
        t_last = s_decays.index(ROWS * i_stage + ROWS - 1)
        b_Sd = gl.convert_layout(b_S.to(DOT), XA)
        b_x = warpgroup_mma(b_Sd, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_o = warpgroup_mma(b_Sd, b_q, b_zero, use_acc=False, is_async=True)
        stage_output(b_od, b_out)
        # Every warp has left the chunk before: no barrier for that alone.
        mbarrier.arrive(free.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
        # Before the first own chunk past the end, where nothing is written.
        i_before = gl.where(i > i_own, i - 1 - i_own, chunks)
        tma.async_copy_shared_to_global(d_o, [i_before * BT, i_first], b_out)
        b_x = warpgroup_mma_wait(1, deps=(b_x,))
        b_decay = t_decay.load(XC)
        b_v = t_v.load(XL)
        if ROWS == 3:
            b_ratio = s_decays.index(ROWS * i_stage + 1).load(XC)
            b_x = b_x * (b_decay * -b_ratio)[None, :] + b_v.to(gl.float32)
        else:
            b_x = b_x * (-b_decay)[None, :] + b_v.to(gl.float32)
        b_xd = gl.convert_layout(b_x.to(DOT), XA)
        b_u = warpgroup_mma(b_xd, b_inverse, b_zero, use_acc=False, is_async=True)
        b_S = b_S * t_last.load(SR)[:, None]
        b_o = warpgroup_mma_wait(1, deps=(b_o,))
        if HALVES == 2:  # once more, which takes fewer registers
            b_decay = t_decay.load(XC)
        b_o = b_o * b_decay[None, :]
        b_o = warpgroup_mma(b_xd, b_weights, b_o, is_async=True)
        b_u = warpgroup_mma_wait(1, deps=(b_u,))
        b_ud = gl.convert_layout(b_u.to(DOT), SA)
        b_S = warpgroup_mma(b_ud, b_k, b_S, is_async=True)
        b_o = warpgroup_mma_wait(1, deps=(b_o,))
        b_od = (b_o * scale).to(DOT)
        b_S = warpgroup_mma_wait(0, deps=(b_S,))
    # The tokens of an empty sequence may begin where no memory is, which no descriptor may name.
    if chunks > 0:
        stage_output(b_od, b_out)
        tma.async_copy_shared_to_global(d_o, [(chunks - 1 - i_own) * BT, i_first], b_out)
    p_final, stride_v, stride_k, m_last = write
    p_final += o_v[:, None] * stride_v + o_k[None, :] * stride_k
    gl.store(p_final, b_S.to(p_final.dtype.element_ty), m_last)
    tma.store_wait(0)


@gluon.jit
def walk_low(tiles, bars, sources, read, write, i_v, i_skip, chunks, C: gl.constexpr):
    """The first 64 rows."""
    walk_chunks(tiles, bars, sources, read, write, i_v, i_skip, chunks, C, 0)


@gluon.jit
def walk_high(tiles, bars, sources, read, write, i_v, i_skip, chunks, C: gl.constexpr):
    """The other 64 rows."""
    walk_chunks(tiles, bars, sources, read, write, i_v, i_skip, chunks, C, 1)
