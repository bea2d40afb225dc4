"""FlashInfer: decode, several tokens, and prefill with context parallelism where it chooses so."""

import torch

from benchmarks.cases import Case
from benchmarks.contender import Call, NotServed, tokens_of
from benchmarks.peers.gates import gated
from benchmarks.rows import Row

NAME = "FlashInfer"
PACKAGE = "flashinfer-python"


def make_call(row: Row, case: Case) -> Call:
    if row.name == "train":
        raise NotServed("no gradient")
    if row.name in ("prefill", "prefill_serving"):
        return prefill(row, case)
    return step(row, case)


def prefill(row: Row, case: Case) -> Call:
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    packed = {"cu_seqlens": case.cu_seqlens, "output_final_state": True, "max_seqlen": row.T}

    if row.name == "prefill":
        q, k, v, g, beta = (x.flatten(0, 1) for x in tokens_of(case))
        alpha = g.exp()  # its decay is linear
        output_state = torch.empty_like(case.pool[: row.N], dtype=torch.float32)

        def core() -> object:
            o, state = chunk_gated_delta_rule(
                q, k, v, alpha, beta, output_state=output_state, **packed
            )
            return o.view(case.v.shape), state

        return core

    def serve() -> object:
        tokens = (x.flatten(0, 1) for x in gated(case, normalise=True, linear_decay=True))
        o, _ = chunk_gated_delta_rule(
            *tokens,
            initial_state=case.pool,
            output_state=case.pool,
            state_indices=case.slots,
            **packed,
        )
        return o.view(case.v.shape)

    return serve


def step(row: Row, case: Case) -> Call:
    from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose, gated_delta_rule_mtp

    q, k, v = (x.contiguous() for x in case.raw)
    gates = {"A_log": case.A_log, "a": case.a, "dt_bias": case.dt_bias, "b": case.b}
    if row.name == "verify" and row.state != "fp32":
        raise NotServed("its step that scatters states into a pool takes float32 states only")
    if row.name == "decode" or row.state != "fp32":
        return lambda: gated_delta_rule_decode_pretranspose(
            q, k, v, None, **gates, initial_state=case.pool, initial_state_indices=case.slots
        )[0]
    if row.name == "verify_once":
        return lambda: gated_delta_rule_mtp(
            q, k, v, case.pool, case.slots, **gates, disable_state_update=False
        )[0]
    # It wants to read from slots that it does not write.
    return lambda: gated_delta_rule_mtp(
        q,
        k,
        v,
        case.pool,
        case.spare,
        **gates,
        ssm_state_indices=case.table,
        disable_state_update=False,
    )[0]
