"""Seeded inputs like a trained model's: unit keys, long and short memories, hard resets."""

from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """The sizes of a call; its text is the id of a test."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int

    def __str__(self):
        return "-".join(f"{name}{size}" for name, size in self._asdict().items())


class Tokens(NamedTuple):
    """What a call reads of its tokens, in the order of every operator's first arguments."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    beta: torch.Tensor | None

    def rows(self, *index):
        """The tokens that ``index`` chooses from ``[B, T, ...]``."""
        return self.map(lambda x: x[index])

    def map(self, function):
        return Tokens(*(None if x is None else function(x) for x in self))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_inputs(
    B,
    T,
    H,
    HV,
    K,
    V,
    dtype=torch.float32,
    *,
    device="cpu",
    seed=0,
    kda=False,
    strong_decay=True,
    negative_eigenvalues=False,
    beta_dtype=None,
    unit_keys=True,
):
    """Tokens of the given sizes.

    ``kda`` asks for a decay for every key dimension, ``g [B, T, HV, K]``. With ``strong_decay``
    about one token in sixteen forgets all that came before (``g = -20``). With
    ``negative_eigenvalues`` beta is in ``[0, 2]`` instead of ``[0, 1]``. Models have ``unit_keys``,
    of length 1: longer ones let the state grow.
    """
    source = generator(seed)
    wide = torch.float64

    def normal(*size):
        return torch.randn(size, generator=source, dtype=wide)

    def uniform(*size):
        return torch.rand(size, generator=source, dtype=wide)

    q, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, HV, V)
    if unit_keys:
        k = k / k.norm(dim=-1, keepdim=True)
    # As models initialise them: A in [1, 16], and a time step of 0.001 to 0.1 that tokens modulate.
    channels = (HV, K) if kda else (HV,)
    time_step = 10 ** (-3 + 2 * uniform(*channels)) * torch.exp(normal(B, T, *channels))
    g = -(1 + 15 * uniform(*channels)) * time_step
    if strong_decay:
        g = torch.where(uniform(*g.shape) < 1 / 16, -20.0, g)
    beta = torch.sigmoid(2 * normal(B, T, HV)) * (2 if negative_eigenvalues else 1)
    if beta_dtype is None:
        beta_dtype = wide if dtype == wide else torch.float32
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    g = g.to(device, wide if dtype == wide else torch.float32)
    return Tokens(q, k, v, g, beta.to(device, beta_dtype))


def make_state(N, HV, V, K, dtype=torch.float32, *, device="cpu", seed=1):
    """States of about the size that the recurrence reaches."""
    return (0.5 * torch.randn(N, HV, V, K, generator=generator(seed))).to(device, dtype)


def make_convolution(B, T, D, W, dtype=torch.float32, *, device="cpu", seed=0):
    """``x [B, T, D]``, ``weight [D, W]`` and ``bias [D]``."""
    source = generator(seed)
    x = torch.randn(B, T, D, generator=source, dtype=torch.float64)
    weight = torch.randn(D, W, generator=source, dtype=torch.float64) * W**-0.5
    bias = torch.randn(D, generator=source, dtype=torch.float64) * 0.1
    return tuple(y.to(device, dtype) for y in (x, weight, bias))


def cu_seqlens(lengths, dtype=torch.int32, device="cpu"):
    """The bounds of packed sequences of these lengths."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return torch.tensor(bounds, dtype=dtype, device=device)


def indices(values, dtype=torch.int32, device="cpu"):
    """Slots, accepted counts or a table of slots."""
    return torch.tensor(values, dtype=dtype, device=device)


def spread(values, slot_gap=0, head_gap=0, offset=0):
    """``values [slots, heads, ...]`` inside a larger buffer: the view, and the buffer.

    Args:
        values: What the view holds.
        slot_gap: Elements between one slot and the next, as a serving engine's pages have them.
        head_gap: Elements between one head and the next.
        offset: Elements before the first slot.
    """
    slots, heads, *inner = values.shape
    head_stride = values[0, 0].numel() + head_gap
    slot_stride = heads * head_stride + slot_gap
    # A value that no test computes: whoever reads or writes the gaps is found out.
    buffer = torch.full(
        (offset + slots * slot_stride,), -7777.0, dtype=values.dtype, device=values.device
    )
    strides = torch.empty(inner, device="meta").stride()
    view = buffer.as_strided(values.shape, (slot_stride, head_stride, *strides), offset)
    view.copy_(values)
    return view, buffer
