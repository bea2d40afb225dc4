"""Flash Linear Attention: its chunked operator; it has none that updates a pool in place."""

from benchmarks.cases import Case
from benchmarks.contender import Call, NotServed, gradients, tokens_of
from benchmarks.rows import Row

NAME = "FLA"
PACKAGE = "fla-core"


def make_call(row: Row, case: Case) -> Call:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    if row.name == "train":
        return gradients(chunk_gated_delta_rule, case)
    if row.name == "prefill":

        def prefill() -> object:
            o, state = chunk_gated_delta_rule(*tokens_of(case), output_final_state=True)
            return o, state.mT

        return prefill
    if row.name != "prefill_serving":
        raise NotServed("no operator that updates a pool of states in place")
    slots = case.slots.long()

    def serve() -> object:
        # Its own gate, sigmoid and norm; states are gathered and scattered around it.
        q, k, v = case.raw
        o, state = chunk_gated_delta_rule(
            q,
            k,
            v,
            case.a,
            case.b,
            initial_state=case.pool[slots],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=case.A_log,
            dt_bias=case.dt_bias,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=True,
        )
        case.pool.index_copy_(0, slots, state.to(case.pool.dtype))
        return o

    return serve
