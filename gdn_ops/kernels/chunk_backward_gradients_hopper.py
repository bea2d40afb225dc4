"""Third stage of the chunked backward on Hopper: chunk_backward_gradients.py's maths, with roles.

A program serves chunks of key heads one after the other, as many programs as multiprocessors, in
Gluon. Its roles, and of which file their code is:

    multiply     two warp groups (chunk_backward_gradients_products.py)
    sum_states   a warp group: dv, and ``<S, dS>`` (this and the rest in ..._gradients_roles.py)
    load         a warp: tokens and states, by tensor descriptors
    make_gates   a warp: rows of gates (chunk_backward_gates.py)
    finish       a warp: dg and dbeta of what others have summed; it sends dq and dk

and their barriers, ``full_`` when what they name is there, ``free_`` when nobody needs it any more,
each with who arrives on the second:

    qk      q and k of a chunk and key head: two stages, whose place dq and dk take (finish)
    t       do, dr and u of a value head, in this order in four places, so that do of the next head
            is there before, and its dr and u come while this head's products with dS run (multiply
            and sum_states)
    g       its gates: two stages (multiply, sum_states and finish)
    S, dS   the states around the chunk (multiply and sum_states)
    p       sums of a value head (finish)
    F, N    only full: products of tokens, and sums for norms, of both groups (multiply)
    o       only full: dq and dk, in the two stages of q and k (multiply)

Bytes of shared memory: q and k 65536, tokens 65536, states 65536, products of tokens 16384, gates
5120, sums 2816. dbeta of tokens with next to no beta is chunk_backward_beta.py's, gradients of
tokens of no sequence and where packed sequences have their chunks chunk_backward_places.py's.

Needs K = V = 128, chunks of 64 tokens of bfloat16, tensors that fit descriptors, sm_90, and a
Triton of ``GLUON`` in chunk_hopper.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .chunk_backward_gates import BT, GATES, ROW, STAGES
from .chunk_backward_gradients_products import PLACES, SUMS, TILE, multiply_high, multiply_low
from .chunk_backward_gradients_roles import finish, load, make_gates, sum_states
from .chunk_scan_walk import group_barrier

# Registers of a thread of the second group, and of the other roles. The first has what they leave
# of 512. With 208 and 48 gradients took 4 to 6 % longer (H200, Triton 3.6, 2026-11-30, an earlier
# form).
REGISTERS = gl.constexpr((200, 56, 56, 56, 56))


@gluon.jit
def gradients_hopper_kernel(
    do,
    q,
    k,
    beta,
    G,
    places,
    states,
    writes,
    dk,
    dv,
    dg,
    dbeta,
    dq,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_beta_b,
    stride_beta_t,
    stride_beta_h,
    B,
    T,
    chunks,
    scale: gl.constexpr,
    H: gl.constexpr,
    HV: gl.constexpr,
    HAS_G: gl.constexpr,
    HAS_BETA: gl.constexpr,
    IS_VARLEN: gl.constexpr,
    USE_QK_L2NORM: gl.constexpr,
):
    """Every so many chunks of a key head; the grid is at most their number."""
    DOT: gl.constexpr = q.dtype.element_ty
    R: gl.constexpr = HV // H
    s_q = gl.allocate_shared_memory(DOT, [STAGES, BT, 128], TILE)
    s_k = gl.allocate_shared_memory(DOT, [STAGES, BT, 128], TILE)
    s_F = gl.allocate_shared_memory(DOT, [2, BT, BT], TILE)
    s_tokens = gl.allocate_shared_memory(DOT, [PLACES, BT, 128], TILE)
    s_S = gl.allocate_shared_memory(DOT, [1, 128, 128], TILE)
    s_dS = gl.allocate_shared_memory(DOT, [1, 128, 128], TILE)
    s_gates = gl.allocate_shared_memory(gl.float32, [GATES * STAGES, BT], ROW)
    s_sums = gl.allocate_shared_memory(gl.float32, [2 * SUMS, BT], ROW)
    s_norms = gl.allocate_shared_memory(gl.float32, [4, BT], ROW)
    t_state = gl.allocate_shared_memory(gl.float32, [BT], ROW)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    full_qk = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free_qk = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    full_t = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BAR)
    free_t = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BAR)
    full_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    full_o = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    # Of one place each: full_S, free_S, full_dS, free_dS, full_p, free_p, full_F, full_N.
    COUNTS: gl.constexpr = (1, 3, 1, 3, 3, 1, 2, 2)
    one = gl.allocate_shared_memory(gl.int64, [8, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full_qk.index(i), count=1)
        mbarrier.init(free_qk.index(i), count=1)
        mbarrier.init(full_g.index(i), count=1)
        mbarrier.init(free_g.index(i), count=4)
        mbarrier.init(full_o.index(i), count=2)
    for i in gl.static_range(PLACES):
        mbarrier.init(full_t.index(i), count=1)
        mbarrier.init(free_t.index(i), count=3)
    for i in gl.static_range(8):
        mbarrier.init(one.index(i), count=COUNTS[i])
    fence_async_shared()
    group_barrier()
    i_start = gl.program_id(0)
    count = gl.cdiv(B * chunks * H - i_start, gl.num_programs(0))
    C: gl.constexpr = (scale, HAS_G, R, HV, HAS_BETA, USE_QK_L2NORM, IS_VARLEN)
    p_places = G  # of what is absent there is no pointer
    if IS_VARLEN:
        p_places = places
    args = (
        (s_q, s_k, s_F, s_tokens, s_S, s_dS),
        (s_gates, s_sums, s_norms, t_state),
        (
            (full_qk, free_qk, full_t, free_t, full_g, free_g),
            (
                one.index(0),
                one.index(1),
                one.index(2),
                one.index(3),
                one.index(4),
                one.index(5),
                one.index(6),
                one.index(7),
                full_o,
            ),
        ),
        (
            (q, stride_q_b, stride_q_t, stride_q_h),
            (k, stride_k_b, stride_k_t, stride_k_h),
            do,
            writes,
            states,
            (dq, T * H * 128, H * 128, 128),
            (dk, T * H * 128, H * 128, 128),
            dv,
            (G, beta, stride_beta_b, stride_beta_t, stride_beta_h),
            (dg, dbeta),
        ),
        (B, T, H, chunks, i_start, count, gl.num_programs(0), p_places),
        C,
    )
    gl.warp_specialize(
        [
            (multiply_low, args),
            (multiply_high, args),
            (sum_states, args),
            (load, args),
            (make_gates, args),
            (finish, args),
        ],
        [4, 4, 1, 1, 1],
        REGISTERS,
    )
