"""Gated Delta Net as first-class PyTorch operators, ``torch.ops.gdn.*``.

Importing this package registers the operators; it imports neither triton nor ``torch._inductor``.
"""

from .causal_conv1d import causal_conv1d as causal_conv1d
from .causal_conv1d import causal_conv1d_ as causal_conv1d_
from .chunk import chunk as chunk
from .chunk import chunk_ as chunk_
from .gate import gdn_gate as gdn_gate
from .integrations.fla import chunk_gated_delta_rule as chunk_gated_delta_rule
from .integrations.fla import fused_recurrent_gated_delta_rule as fused_recurrent_gated_delta_rule
from .recurrent import recurrent as recurrent
from .recurrent import recurrent_ as recurrent_
from .rms_norm_gated import rms_norm_gated as rms_norm_gated

__version__ = "0.1.0"
