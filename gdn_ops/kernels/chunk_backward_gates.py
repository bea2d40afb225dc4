"""Gates of a chunk for the backward's stages in Gluon: rows of shared memory, made by a warp.

A kernel has STAGES of them, each GATES rows of ``BT`` numbers. With the norms of USE_QK_L2NORM,
which are 1 without, of the token of each place:

    TO_Q       log2 of exp(G) q_scale scale     less FROM of a key: log2 of D scale of its pairs
    TO_K       log2 of exp(G) k_scale           and of D
    FROM       log2 of exp(G) / k_scale
    THROUGH_Q  exp(G) q_scale scale             from the state before to a query
    THROUGH_K  - exp(G) k_scale                 and to what a key reads
    TAIL       exp(G_last - G) k_scale          from what a token writes to the state after
    BETA, Q_SCALE, K_SCALE
    LAST       exp(G_last), the same for all tokens

Past the sequence beta is zero, and no difference is large.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .chunk_scan_walk import group_barrier

BT, STAGES = gl.constexpr(64), gl.constexpr(2)
TO_Q, TO_K, FROM, THROUGH_Q, THROUGH_K, TAIL, BETA, Q_SCALE, K_SCALE, LAST = (
    gl.constexpr(i) for i in range(10)
)
GATES = gl.constexpr(10)
ROW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# A row of numbers in a warp, two in each lane.
LANES = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))


@gluon.jit
def load_gates(
    p_G,
    p_beta,
    stride_beta_t,
    valid,
    HAS_BETA: gl.constexpr,
    NORMS: gl.constexpr,
    MAY_BE_EMPTY: gl.constexpr,
):
    """Log decays to base 2, as chunk_prepare.py has them, that of the last token, and beta."""
    o_i = gl.arange(0, BT, layout=LANES)
    m_t = o_i < valid
    i_last = gl.minimum(valid, BT) - 1
    # Where it need not be, it is 12 % of the first walk of 8192 tokens (H200, 2026-11-30).
    if MAY_BE_EMPTY:
        i_last = gl.maximum(i_last, 0)
    b_last = gl.load(p_G + i_last) * 1.4426950408889634
    b_G = gl.where(m_t, gl.load(p_G + o_i, m_t, 0.0) * 1.4426950408889634, b_last)
    b_Gq, b_Gk = b_G, b_G
    if NORMS:
        b_Gq = gl.load(p_G + BT + o_i, m_t, 0.0) * 1.4426950408889634
        b_Gk = gl.load(p_G + 2 * BT + o_i, m_t, 0.0) * 1.4426950408889634
        b_Gq, b_Gk = gl.where(m_t, b_Gq, b_last), gl.where(m_t, b_Gk, b_last)
    b_beta = gl.where(m_t, 1.0, 0.0)
    if HAS_BETA:
        b_beta = gl.load(p_beta + o_i * stride_beta_t, m_t, 0.0).to(gl.float32)
    return b_G, b_Gq, b_Gk, b_last, b_beta


@gluon.jit
def store_gates(gates, j, b_gates, scale: gl.constexpr, NORMS: gl.constexpr):
    """The ``j``-th rows, as soon as their stage is free."""
    s_gates, full_g, free_g = gates
    b_G, b_Gq, b_Gk, b_last, b_beta = b_gates
    b_zero = gl.zeros_like(b_G)
    i_gate = j % STAGES * GATES
    mbarrier.wait(free_g.index(j % STAGES), ((j // STAGES) & 1) ^ 1)
    s_gates.index(i_gate + TO_Q).store(b_Gq + gl.log2(b_zero + scale))
    s_gates.index(i_gate + TO_K).store(b_Gk)
    s_gates.index(i_gate + FROM).store(2 * b_G - b_Gk)
    s_gates.index(i_gate + THROUGH_Q).store(gl.exp2(b_Gq) * scale)
    s_gates.index(i_gate + THROUGH_K).store(-gl.exp2(b_Gk))
    s_gates.index(i_gate + TAIL).store(gl.exp2(b_last - b_G + (b_Gk - b_G)))
    s_gates.index(i_gate + BETA).store(b_beta)
    s_gates.index(i_gate + LAST).store(gl.exp2(b_last + b_zero))
    if NORMS:
        s_gates.index(i_gate + Q_SCALE).store(gl.exp2(b_Gq - b_G))
        s_gates.index(i_gate + K_SCALE).store(gl.exp2(b_Gk - b_G))
    group_barrier()
    mbarrier.arrive(full_g.index(j % STAGES), count=1)


@gluon.jit
def make_gates_of_sequence(gates, sources, length, chunks, C: gl.constexpr, IS_BACK: gl.constexpr):
    """Rows of gates of the chunks of a sequence and value head, one after the other, or back."""
    scale: gl.constexpr = C[0]
    HV: gl.constexpr = C[1]
    HAS_BETA: gl.constexpr = C[2]
    NORMS: gl.constexpr = C[3]
    ROWS: gl.constexpr = 3 if NORMS else 1
    p_G, p_beta, stride_beta_t = sources
    for i in range(chunks):
        i_t = chunks - 1 - i if IS_BACK else i
        i_first = (i_t * BT).to(gl.int64)
        p_t = p_beta
        if HAS_BETA:
            p_t += i_first * stride_beta_t
        p_row = p_G + i_first * (HV * ROWS)
        valid = length - i_t * BT
        b_gates = load_gates(p_row, p_t, stride_beta_t, valid, HAS_BETA, NORMS, False)
        store_gates(gates, i, b_gates, scale, NORMS)
