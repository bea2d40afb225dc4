"""What stands in a cache of transformers for a layer whose state updates itself."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from gdn_ops.integrations.transformers.slot_state import SlotInputs, SlotState


class LendingLayer(LinearAttentionLayer):  # type: ignore[misc]  # transformers is not checked
    """Lends its ``SlotState`` to the model code, in place of both states of a layer."""

    def __init__(self, slots: SlotState) -> None:
        super().__init__()
        self.record_past = True  # the model code then leaves the history to the cache
        self.has_previous_state[0] = True  # the slots hold zeros before the first token
        self.lend(slots)

    def lend(self, slots: SlotState) -> None:
        """Have ``slots`` updated from now on."""
        self.conv_states[0] = self.recurrent_states[0] = self.slots = slots

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any
    ) -> SlotInputs:
        return SlotInputs(self.slots, conv_states)

    def update_recurrent_state(
        self, recurrent_states: SlotState, state_idx: int = 0, **kwargs: Any
    ) -> SlotState:
        return self.slots
