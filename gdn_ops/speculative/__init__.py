"""Speculative decoding of hybrid models in one compiled step, for a batch of sequences.

See ``SpeculativeDecoder``; docs/speculative.md has the scheme.
"""

from gdn_ops.speculative.decoder import SpeculativeDecoder
from gdn_ops.speculative.draft_model import DraftModel
from gdn_ops.speculative.proposer import PromptLookup, Proposer

__all__ = ["DraftModel", "PromptLookup", "Proposer", "SpeculativeDecoder"]
