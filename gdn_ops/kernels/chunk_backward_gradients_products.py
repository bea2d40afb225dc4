"""The roles of chunk_backward_gradients_hopper.py that multiply: two groups, each with half of K.

Of a chunk and key head each has 64 columns of dq and dk in its registers, from value head to value
head. The products of tokens are the first group's for queries, the second's for keys,

    group 0    do u^T, of which comes dqk = D scale do u^T        lower, with the diagonal
    group 1    dr u^T, of which comes dkk = - beta D dr u^T       strictly lower

and both need both, rounded, which are in shared memory:

    dq += exp(G) scale do S + dqk k
    dk += P + M,   P = - exp(G) beta dr S + dkk k,   M = dqk^T q + dkk^T k + exp(G_last - G) u dS

What follows for ``G`` of a token are inner products of rows, ``<dq, q> + <P, k> - <M, k>``. Those
of pairs of tokens cancel in sums, so all are of what was rounded. Since ``u`` is beta times what
dbeta multiplies by ``dr``, the diagonal of ``dr u^T`` is ``beta dbeta``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .chunk_backward_gates import (
    BETA,
    BT,
    FROM,
    GATES,
    K_SCALE,
    Q_SCALE,
    STAGES,
    TAIL,
    THROUGH_K,
    THROUGH_Q,
    TO_K,
    TO_Q,
)
from .chunk_scan_walk import XC, XL, XR, group_barrier, tile_layout

# Places of tiles of tokens.
PLACES = gl.constexpr(4)
# Rows of sums that a group leaves of a value head: what becomes of G of each token, of which those
# of decays to the end of the chunk; of the second group beta dbeta.
BY_TOKEN, BY_TAIL, BY_BETA = (gl.constexpr(i) for i in range(3))
SUMS = gl.constexpr(3)
TILE = gl.constexpr(tile_layout())


@gluon.jit
def place_of_tile(sizes, n, C: gl.constexpr):
    """Of tile ``n`` of a program: row of the batch, place, first token, tokens left, key head."""
    IS_VARLEN: gl.constexpr = C[6]
    _, T, H, chunks, i_start, _, step, p_places = sizes
    i_tile = i_start + n * step
    i_place = i_tile // H
    i_b = i_place // chunks
    i_t = (i_place - i_b * chunks) * BT
    valid = T - i_t
    if IS_VARLEN:
        i_t = gl.load(p_places + 2 * i_place)
        valid = gl.load(p_places + 2 * i_place + 1)
    return i_b, i_place, i_t, valid, i_tile % H


@gluon.jit
def clear_rows(t_x, valid):
    """Zeros where another sequence's tokens are: a product with zeros leaves what is no number."""
    o_r = gl.arange(0, BT, layout=XR)[:, None]
    t_x.store(gl.where(o_r < valid, t_x.load(XL), 0.0))


@gluon.jit
def product(t_x, t_y):
    """``x y`` of tiles in shared memory, under way."""
    b_zero = gl.zeros((BT, BT), gl.float32, XL)
    return warpgroup_mma(t_x, t_y, b_zero, use_acc=False, is_async=True)


@gluon.jit
def weigh_pairs(b_x, t_gates, i_gate, valid, zero, HALF: gl.constexpr, IS_VARLEN: gl.constexpr):
    """Of products of tokens dqk or dkk, and the diagonal that they had."""
    o_r = gl.arange(0, BT, layout=XR)[:, None]
    o_c = gl.arange(0, BT, layout=XC)[None, :]
    m_pair = o_r >= o_c if HALF == 0 else o_r > o_c
    # Rows of another sequence; columns that are not valid are above the diagonal of rows that are.
    if IS_VARLEN:
        m_pair = m_pair & (o_r < valid)
    b_to = t_gates.index(i_gate + (TO_Q if HALF == 0 else TO_K)).load(XR)
    b_D = gl.exp2(b_to[:, None] - t_gates.index(i_gate + FROM).load(XC)[None, :])
    if HALF == 0:
        return gl.where(m_pair, b_x * b_D, zero), gl.zeros((BT,), gl.float32, XR)
    b_own = gl.sum(gl.where(o_r == o_c, b_x, 0.0), 1)
    b_x = b_x * -t_gates.index(i_gate + BETA).load(XR)[:, None]
    return gl.where(m_pair, b_x * b_D, zero), b_own


@gluon.jit
def inner_product(b_x, t_y):
    """Of the rows of half of the columns."""
    return gl.sum(b_x * t_y.load(XL).to(gl.float32), 1)


@gluon.jit
def remove_norm(b_dx, t_x, b_scale, b_inner):
    """Of the gradient of what was normalised that of what it was before: less what is along it."""
    b_x = t_x.load(XL).to(gl.float32)
    return b_dx - b_x * (b_scale * b_scale * b_inner)[:, None]


@gluon.jit
def remove_norms(b_dq, b_dk, t_q, t_k, t_gates, i_gate, s_norms, full_N, n, HALF: gl.constexpr):
    """The same of dq and dk; inner products of rows are sums of both groups."""
    s_norms.index(2 * HALF).store(inner_product(b_dq, t_q))
    s_norms.index(2 * HALF + 1).store(inner_product(b_dk, t_k))
    group_barrier()
    mbarrier.arrive(full_N, count=1)
    mbarrier.wait(full_N, n & 1)
    b_inner = s_norms.index(0).load(XR) + s_norms.index(2).load(XR)
    b_dq = remove_norm(b_dq, t_q, t_gates.index(i_gate + Q_SCALE).load(XR), b_inner)
    b_inner = s_norms.index(1).load(XR) + s_norms.index(3).load(XR)
    b_dk = remove_norm(b_dk, t_k, t_gates.index(i_gate + K_SCALE).load(XR), b_inner)
    return b_dq, b_dk


@gluon.jit
def multiply(tiles, gates, bars, tokens, sizes, C: gl.constexpr, HALF: gl.constexpr):
    """The role of a warp group: 64 columns of dq and dk, of a chunk after the other."""
    R: gl.constexpr = C[2]
    USE_QK_L2NORM: gl.constexpr = C[5]
    IS_VARLEN: gl.constexpr = C[6]
    s_q, s_k, s_F, s_tokens, s_S, s_dS = tiles
    s_gates, s_sums, s_norms = gates[0], gates[1], gates[2]
    full_qk, _, full_t, free_t, full_g, free_g = bars[0]
    full_S, free_S, full_dS, free_dS, full_p, free_p, full_F, full_N, full_o = bars[1]
    DOT: gl.constexpr = s_q.dtype
    _, _, _, _, _, count, _, _ = sizes
    # Of a known zero the compiler would choose after rounding, with halves of registers.
    zero = gl.where(count < 0, 1.0, 0.0)
    b_zero = gl.zeros((BT, BT), gl.float32, XL)
    j = count * 0
    for n in range(count):
        valid = place_of_tile(sizes, n, C)[3]
        b_dq = b_zero
        b_dk = b_zero
        b_before_q = gl.zeros((BT,), gl.float32, XR)
        b_before_k = b_before_q
        for r in range(R):
            # Zero, which the compiler does not know: of what is always at one place it would keep
            # an address for each product, in more registers than there are.
            i_zero = j >> 30
            i_gate = j % STAGES * GATES
            t_q, t_k = s_q.index(n % STAGES + i_zero), s_k.index(n % STAGES + i_zero)
            t_qh, t_kh = t_q.slice(HALF * 64, 64, dim=1), t_k.slice(HALF * 64, 64, dim=1)
            i_do, i_dr, i_u = 3 * j, 3 * j + 1, 3 * j + 2
            t_do = s_tokens.index(i_do % PLACES)
            t_dr = s_tokens.index(i_dr % PLACES)
            t_u = s_tokens.index(i_u % PLACES)
            # From token to token.
            mbarrier.wait(full_t.index(i_do % PLACES), (i_do // PLACES) & 1)
            mbarrier.wait(full_t.index(i_dr % PLACES), (i_dr // PLACES) & 1)
            mbarrier.wait(full_t.index(i_u % PLACES), (i_u // PLACES) & 1)
            b_x = product(t_do if HALF == 0 else t_dr, t_u.permute((1, 0)))
            mbarrier.wait(full_g.index(j % STAGES), (j // STAGES) & 1)
            b_x = warpgroup_mma_wait(0, deps=(b_x,))
            b_x, b_own = weigh_pairs(b_x, s_gates, i_gate, valid, zero, HALF, IS_VARLEN)
            # Both groups are done with those of the head before: else dr, whose place u has, would
            # not be free.
            s_F.index(HALF + i_zero).store(b_x.to(DOT))
            fence_async_shared()
            group_barrier()
            mbarrier.arrive(full_F, count=1)
            # Through the state before, and from token to token.
            t_S = s_S.index(i_zero).slice(HALF * 64, 64, dim=1)
            mbarrier.wait(full_S, j & 1)
            b_y = product(t_do, t_S)
            b_z = product(t_dr, t_S)
            mbarrier.wait(free_p, (j & 1) ^ 1)
            if HALF == 1:
                s_sums.index(SUMS + BY_BETA).store(b_own)
            mbarrier.wait(full_F, j & 1)
            mbarrier.wait(full_qk.index(n % STAGES), (n // STAGES) & 1)
            if IS_VARLEN and (r == 0) & (valid < BT):
                clear_rows(t_qh, valid)
                clear_rows(t_kh, valid)
                fence_async_shared()
                group_barrier()
            t_dqk, t_dkk = s_F.index(i_zero), s_F.index(i_zero + 1)
            b_dq = warpgroup_mma(t_dqk, t_kh, b_dq, is_async=True)
            b_dk = warpgroup_mma(t_dqk.permute((1, 0)), t_qh, b_dk, is_async=True)
            b_dk = warpgroup_mma(t_dkk.permute((1, 0)), t_kh, b_dk, is_async=True)
            b_y, b_z = warpgroup_mma_wait(3, deps=(b_y, b_z))
            b_y = b_y * s_gates.index(i_gate + THROUGH_Q).load(XR)[:, None]
            b_through = s_gates.index(i_gate + THROUGH_K).load(XR)
            b_z = b_z * (b_through * s_gates.index(i_gate + BETA).load(XR))[:, None]
            b_z = warpgroup_mma(t_dkk, t_kh, b_z, is_async=True)
            b_dq, b_dk = warpgroup_mma_wait(1, deps=(b_dq, b_dk))
            b_dq = b_dq + b_y
            b_now = inner_product(b_dq, t_qh)
            b_token = b_now - b_before_q
            b_before_q = b_now
            # Through the gradient of the state after.
            t_dS = s_dS.index(i_zero).slice(HALF * 64, 64, dim=1)
            mbarrier.wait(full_dS, j & 1)
            b_w = product(t_u, t_dS)
            b_z = warpgroup_mma_wait(1, deps=(b_z,))
            group_barrier()
            mbarrier.arrive(free_t.index(i_do % PLACES), count=1)
            mbarrier.arrive(free_t.index(i_dr % PLACES), count=1)
            mbarrier.arrive(free_S, count=1)
            b_dk = b_dk + b_z
            b_token += 2 * inner_product(b_z, t_kh)
            b_w = warpgroup_mma_wait(0, deps=(b_w,))
            b_w = b_w * s_gates.index(i_gate + TAIL).load(XR)[:, None]
            b_dk = b_dk + b_w
            b_now = inner_product(b_dk, t_kh)
            b_token -= b_now - b_before_k
            b_before_k = b_now
            i_sum = SUMS * HALF
            s_sums.index(i_sum + BY_TOKEN).store(b_token)
            s_sums.index(i_sum + BY_TAIL).store(inner_product(b_w, t_kh))
            group_barrier()
            mbarrier.arrive(full_p, count=1)
            mbarrier.arrive(free_t.index(i_u % PLACES), count=1)
            mbarrier.arrive(free_dS, count=1)
            mbarrier.arrive(free_g.index(j % STAGES), count=1, pred=r < R - 1)
            j += 1
        i_stage = (j - 1) % STAGES
        t_q, t_k = s_q.index(n % STAGES), s_k.index(n % STAGES)
        t_q, t_k = t_q.slice(HALF * 64, 64, dim=1), t_k.slice(HALF * 64, 64, dim=1)
        if USE_QK_L2NORM:
            b_dq, b_dk = remove_norms(
                b_dq, b_dk, t_q, t_k, s_gates, i_stage * GATES, s_norms, full_N, n, HALF
            )
        t_q.store(b_dq.to(DOT))
        t_k.store(b_dk.to(DOT))
        fence_async_shared()
        group_barrier()
        mbarrier.arrive(full_o.index(n % STAGES), count=1)
        mbarrier.arrive(free_g.index(i_stage), count=1)


@gluon.jit
def multiply_low(tiles, gates, bars, tokens, sizes, C: gl.constexpr):
    """The first 64 columns, and the products of queries."""
    multiply(tiles, gates, bars, tokens, sizes, C, 0)


@gluon.jit
def multiply_high(tiles, gates, bars, tokens, sizes, C: gl.constexpr):
    """The other 64 columns, and the products of keys."""
    multiply(tiles, gates, bars, tokens, sizes, C, 1)
