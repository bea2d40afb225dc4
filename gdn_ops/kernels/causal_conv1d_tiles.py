"""What the kernels of the convolution share: the tokens and the taps of a program, its tiles."""

import functools

import triton
import triton.language as tl

from .configs import cdiv, next_power_of_2


@triton.jit
def tokens_of_program(i_p, T, BT: tl.constexpr):
    """Sequence, batch row, first token and length of it, block within it; and whether it is one."""
    NT = (T + BT - 1) // BT
    i_n = i_p // NT
    return i_n, i_n, i_p * 0, T, i_p % NT, i_p >= 0


@triton.jit
def packed_tokens_of_program(i_p, programs, cu_seqlens, stride_n, T, BT: tl.constexpr):
    """The same for packed rows.

    Sequence ``n`` has the programs from ``cu_seqlens[n] // BT + n`` on, at least as many as it has
    blocks, so that ``T // BT + N + 1`` programs suffice for any bounds.
    """
    N = programs - T // BT - 1
    i_n = -1
    for i in range(0, N + 1, 128):
        o_n = i + tl.arange(0, 128)
        m_n = o_n <= N
        b_n = tl.load(cu_seqlens + o_n * stride_n, m_n, 0).to(tl.int32)
        i_n += tl.sum((m_n & (b_n // BT + o_n <= i_p)).to(tl.int32), 0)
    is_live = i_n < N
    p_n = cu_seqlens + i_n * stride_n
    t_start = tl.minimum(tl.load(p_n).to(tl.int32), T)
    t_end = tl.minimum(tl.load(p_n + stride_n, is_live, T).to(tl.int32), T)
    return i_n, i_n * 0, t_start, t_end - t_start, i_p - t_start // BT - i_n, is_live


@triton.jit
def load_taps(weight, o_d, m_d, stride_weight_d, stride_weight_w, W: tl.constexpr):
    """The ``W`` taps of channels ``o_d [1, BD]``, a tuple of tiles like it."""
    taps: tl.tuple = ()
    if W == 4:
        # One load of all four: tap by tap, the lanes would read with gaps between them.
        o_w = tl.arange(0, 4)
        p_w = weight + tl.trans(o_d) * stride_weight_d + o_w[None, :] * stride_weight_w
        b_w = tl.load(p_w, tl.trans(m_d), 0.0)
        b_even, b_odd = tl.split(tl.reshape(b_w, (o_d.shape[1], 2, 2)))
        b_0, b_2 = tl.split(b_even)
        b_1, b_3 = tl.split(b_odd)
        taps = (b_0[None, :], b_1[None, :], b_2[None, :], b_3[None, :])
    else:
        for j in tl.static_range(W):
            p_w = weight + o_d * stride_weight_d + j * stride_weight_w
            taps += (tl.load(p_w, m_d, 0.0),)
    return taps


@functools.cache
def causal_conv1d_config(
    N: int,
    T: int,
    D: int,
    W: int,
    *,
    itemsize: int,
    is_varlen: bool,
    is_channel_major: bool,
    has_wide_state: bool,
) -> tuple[int, int, int, int]:
    """``BT``, ``BR``, ``BD`` and warps.

    A program is one warp, and a lane moves 16 bytes of ``x`` at a time. With few tokens the states
    are most of the traffic: where their channels are not contiguous (``has_wide_state``) neighbours
    in a warp had better read neighbours in memory, two channels a lane.

    Args:
        N: Sequences.
        T: Tokens of each, or of all where they are packed.
        D: Channels.
        W: Taps.
        itemsize: Bytes of a number of ``x``.
        is_varlen: The sequences are packed.
        is_channel_major: Tokens are contiguous in ``x``, channels are not.
        has_wide_state: Channels are not contiguous in the states.
    """
    L = cdiv(T, N) if is_varlen else T
    least = next_power_of_2(W - 1) if is_varlen or T > 16 else 1
    if is_channel_major and L >= 16:
        BT = max(32, least)
        return BT, BT, 32, 2
    BT = max(min(next_power_of_2(L), 16), least)
    BD = min(64 if has_wide_state and L <= 4 else 512 // itemsize, next_power_of_2(D))
    # Fewer programs than this leave multiprocessors idle.
    while BD > 64 and N * cdiv(L, BT) * cdiv(D, BD) < 512:
        BD //= 2
    return BT, 1, BD, 1


def causal_conv1d_backward_config(
    N: int, T: int, D: int, W: int, *, itemsize: int, is_varlen: bool
) -> tuple[int, int, int, int]:
    """``BT``, ``BR``, ``BD`` and warps of the backward kernel; arguments as above.

    Each program leaves ``W + 1`` float32 numbers a channel, and does ``W - 1`` tokens that the next
    one does too: with 128 tokens both are a small part of the whole.
    """
    L = cdiv(T, N) if is_varlen else T
    BR = max(8, next_power_of_2(W - 1))
    BD = min(256 // itemsize, next_power_of_2(D))
    steps = max(2, min(128, next_power_of_2(L + W - 1)) // BR)
    while steps > 2 and N * cdiv(L, steps * BR) * cdiv(D, BD) < 2048:
        steps //= 2
    return steps * BR - (W - 1), BR, BD, 1
