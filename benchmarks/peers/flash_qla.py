"""FlashQLA: chunked prefill and training in TileLang, with splits of long sequences."""

from benchmarks.cases import Case
from benchmarks.contender import Call, NotServed, gradients, tokens_of
from benchmarks.peers.gates import gated
from benchmarks.rows import Row

NAME = "FlashQLA"
PACKAGE = "flash-qla"


def make_call(row: Row, case: Case) -> Call:
    from flash_qla import chunk_gated_delta_rule

    if row.name == "train":
        return gradients(chunk_gated_delta_rule, case)
    if row.name == "prefill":

        def prefill() -> object:
            return chunk_gated_delta_rule(
                *tokens_of(case), output_final_state=True, state_v_first=True
            )

        return prefill
    if row.name != "prefill_serving":
        raise NotServed("no operator that updates a pool of states in place")
    slots = case.slots.long()

    def serve() -> object:
        o, state = chunk_gated_delta_rule(
            *gated(case, normalise=True),
            initial_state=case.pool[slots],
            output_final_state=True,
            state_v_first=True,
        )
        case.pool.index_copy_(0, slots, state.to(case.pool.dtype))
        return o

    return serve
