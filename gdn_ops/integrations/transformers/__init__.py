"""The operators under Hugging Face transformers' model code, without a change to the model.

The model code of transformers reaches its gated delta rule and its convolution through four
functions. ``use_gdn_ops`` puts those of ``functions.py`` in their place; ``releases.py`` knows
where that is in a release of transformers, ``installation.py`` fills it and undoes that.
"""

from gdn_ops.integrations.transformers.functions import (
    REPLACEMENTS,
    causal_conv1d_fn,
    causal_conv1d_update,
    chunk_gated_delta_rule,
    recurrent_gated_delta_rule,
)
from gdn_ops.integrations.transformers.installation import Installation, use_gdn_ops
from gdn_ops.integrations.transformers.releases import FAMILIES

__all__ = [
    "FAMILIES",
    "REPLACEMENTS",
    "Installation",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "recurrent_gated_delta_rule",
    "use_gdn_ops",
]
