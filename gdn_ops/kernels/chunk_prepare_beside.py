"""Preparing chunks beside the scan that walks them, on multiprocessors that the scan leaves idle.

The scan of a long sequence has one program for each 64 rows of a state, on less than half of an
H200. The chunks that it reads (chunk_prepare.py) are prepared in the order in which it walks, by
programs that stay: two on each of the first ``limit`` multiprocessors take one after another, and
say of each when it is ready. Programs on others end at once, where the scan begins. It may, as the
launch that waits for this one (chunk_scan_hopper.py), when all programs here have begun, so it
never holds a multiprocessor that one of those needs which it waits for.

Where all heads forget (chunk_forget.py) segments fill all multiprocessors and read chunks from
everywhere: then all programs work, the scan waits for the last, and nothing is said of each.

Tensors, beside those of chunk_prepare.py:

    done   [ITEMS + items]  int32: how many items, programs of ``prepare_kernel``, are taken;
                            whether all heads forget; how many programs ended at once; and of each
                            item whether it is done
"""

import triton
import triton.language as tl

from .chunk_forget import all_forget, segment_chunks
from .chunk_prepare import prepare_kernel

# Where ``done`` has the first item.
ITEMS = tl.constexpr(3)


@triton.jit
def multiprocessor():
    """The number of the multiprocessor that this program is on."""
    return tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], tl.int32, False, 1)


@triton.jit
def release(p_done):
    """One, once all that this program has written can be read by others, by descriptors too.

    One thread waits for that, of the last of four warps: the first asks for the next item.
    """
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        """{
        .reg .pred p_last;
        .reg .u32 r_thread;
        mov.u32 r_thread, %tid.x;
        setp.eq.u32 p_last, r_thread, 96;
        @p_last fence.proxy.async.global;
        @p_last fence.acq_rel.gpu;
        @p_last st.relaxed.gpu.global.b32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l",
        [p_done.to(tl.int64, bitcast=True)],
        tl.int32,
        False,
        1,
    )


@triton.jit
def begin_kernel(
    kept,
    done,
    T,
    B,
    items,
    HV: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LEAST: tl.constexpr,
    FORGOTTEN: tl.constexpr,
    LOOK: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Nothing is done yet: BW numbers of ``done``; the grid is ``cdiv(ITEMS + items, BW)``."""
    o_i = tl.program_id(0) * BW + tl.arange(0, BW)
    b_done = tl.zeros((BW,), tl.int32)
    if HAS_KEPT:
        chunks = segment_chunks(T, B, BT, SEGMENTS, LEAST)
        is_early = all_forget(kept, T, B, chunks, HV, BT, FORGOTTEN, LOOK, BN)
        b_done = tl.where(o_i == 1, is_early.to(tl.int32), b_done)
    tl.store(done + o_i, b_done, o_i < items + ITEMS)


@triton.jit
def prepare_beside_kernel(
    q,
    k,
    g,
    beta,
    cu_seqlens,
    G,
    weights,
    inverse,
    done,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_q_k,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_k_k,
    stride_g_b,
    stride_g_t,
    stride_g_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    stride_cu_seqlens_n,
    stride_inverse_b,
    stride_inverse_t,
    stride_inverse_h,
    stride_inverse_j,
    T,
    items,
    limit,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_BETA: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    USE_QK_L2NORM: tl.constexpr,
    IS_SCALED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    KB: tl.constexpr,
    STAGES: tl.constexpr,
    HEADS: tl.constexpr,
    NORMS_BY_PRODUCT: tl.constexpr,
    STARTS_NEXT: tl.constexpr,
    PROGRAM: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """``items`` programs of ``prepare_kernel``; the grid is two for each multiprocessor."""
    tl.extra.cuda.gdc_launch_dependents()
    works = (multiprocessor() < limit) | (tl.load(done + 1) != 0)
    # So many stay at least, elsewhere too: beside kernels of another stream, or where numbers of
    # multiprocessors have gaps, few may have found room there.
    ended = tl.atomic_add(done + 2, 1, works == 0, sem="relaxed")
    works |= ended >= tl.num_programs(0) - limit
    i_item = tl.atomic_add(done, 1, works, sem="relaxed")
    i_item = tl.where(works, i_item, items)
    while i_item < items:
        # A loop of one, without which what no item changes is kept in registers: with it 6 numbers
        # are spilled, without 142. As a function that is not inlined it waits for every product.
        for i_one in tl.range(i_item, tl.minimum(i_item + 1, items), disable_licm=True):
            prepare_kernel(
                q,
                k,
                g,
                beta,
                cu_seqlens,
                G,
                weights,
                inverse,
                stride_q_b,
                stride_q_t,
                stride_q_h,
                stride_q_k,
                stride_k_b,
                stride_k_t,
                stride_k_h,
                stride_k_k,
                stride_g_b,
                stride_g_t,
                stride_g_h,
                stride_beta_b,
                stride_beta_t,
                stride_beta_h,
                stride_cu_seqlens_n,
                stride_inverse_b,
                stride_inverse_t,
                stride_inverse_h,
                stride_inverse_j,
                T,
                H,
                HV,
                K,
                HAS_G,
                HAS_BETA,
                IS_VARLEN,
                USE_QK_L2NORM,
                IS_SCALED,
                DOT,
                PRECISION,
                BT,
                BK,
                BN,
                KB,
                STAGES,
                HEADS,
                NORMS_BY_PRODUCT,
                False,
                i_one,
                items,
            )
        # Read again: held in a register beside the item it is one more that is spilled.
        if tl.load(done + 1, volatile=True) == 0:
            release(done + ITEMS + i_item)
        i_item = tl.atomic_add(done, 1, sem="relaxed")
