"""A decode step of a Gated Delta Net layer of Qwen3-Next, to look at without a GPU.

    python -m lowering.inspect examples/inspect_layer.py:decode --mode reduce-overhead

Sizes are those of Qwen3-Next-80B-A3B; tensors are on ``meta`` and take no memory.
"""

from typing import Any

import torch
from torch import Tensor, nn

import gdn_ops

HIDDEN, H, HV, K, V, W = 2048, 16, 32, 128, 128, 4
BATCH, SLOTS = 64, 256


class GatedDeltaNet(nn.Module):
    """Projections, convolution, gates, recurrence, norm: plain PyTorch around the operators."""

    def __init__(self) -> None:
        super().__init__()
        channels = 2 * H * K + HV * V
        self.in_proj = nn.Linear(HIDDEN, channels + HV * V + 2 * HV, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, W))
        self.A_log = nn.Parameter(torch.empty(HV))
        self.dt_bias = nn.Parameter(torch.empty(HV))
        self.norm_weight = nn.Parameter(torch.empty(V))
        self.out_proj = nn.Linear(HV * V, HIDDEN, bias=False)
        # As buffers the pools have a fixed address, which CUDA graphs ask for.
        self.register_buffer("conv_state", torch.empty(SLOTS, channels, W - 1))
        self.register_buffer("state", torch.empty(SLOTS, HV, V, K))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        """One token of each request: ``x [B, 1, HIDDEN]``, its slot ``slots [B]``."""
        B = x.shape[0]
        sizes = [2 * H * K + HV * V, HV * V, HV, HV]
        qkv, z, a, b = self.in_proj(x).split(sizes, -1)
        qkv = gdn_ops.causal_conv1d_(
            qkv, self.conv_weight, None, self.conv_state, slots, activation="silu"
        )
        q, k, v = qkv.split([H * K, H * K, HV * V], -1)
        o = gdn_ops.recurrent_(
            q.view(B, 1, H, K),
            k.view(B, 1, H, K),
            v.view(B, 1, HV, V),
            gdn_ops.gdn_gate(a, self.A_log, self.dt_bias),
            b.sigmoid(),
            self.state,
            slots,
            use_qk_l2norm=True,
        )
        o = gdn_ops.rms_norm_gated(o, z.view(B, 1, HV, V), self.norm_weight)
        return self.out_proj(o.flatten(2))


def decode() -> tuple[nn.Module, tuple[Any, ...]]:
    """The layer and a batch, for ``lowering.inspect``."""
    with torch.device("meta"):
        layer = GatedDeltaNet().bfloat16().requires_grad_(False)
        layer.state = layer.state.float()  # the recurrence accumulates in it
        x = torch.empty(BATCH, 1, HIDDEN, dtype=torch.bfloat16)
        slots = torch.empty(BATCH, dtype=torch.int32)
    return layer, (x, slots)
