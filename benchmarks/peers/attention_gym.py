"""attention-gym: one-token decode with everything inside, and its chunked operator, also paged."""

from benchmarks.cases import Case
from benchmarks.contender import Call, NotServed, gradients, tokens_of
from benchmarks.peers.gates import gated
from benchmarks.rows import Row

NAME = "attention-gym"
PACKAGE = "attn-gym"


def make_call(row: Row, case: Case) -> Call:
    from attn_gym.linear import chunk_gdn, paged_chunk_gdn, recurrent_gdn_decode

    if row.name == "train":
        return gradients(chunk_gdn, case)
    if row.name == "prefill":
        return lambda: chunk_gdn(*tokens_of(case), output_final_state=True)
    if row.name == "prefill_serving":

        def serve() -> object:
            tokens = gated(case, normalise=True)
            if row.N == 1:
                return paged_chunk_gdn(*tokens, case.pool, case.slots)
            # A batch is given as one packed row.
            packed = (x.view(1, row.N * row.T, *x.shape[2:]) for x in tokens)
            return paged_chunk_gdn(*packed, case.pool, case.slots, cu_seqlens=case.cu_seqlens)

        return serve
    if row.name != "decode":
        raise NotServed("no step of several tokens that keeps the state after each")
    qkv = case.qkv[:, 0]
    a, b = (x.view(1, row.N, -1) for x in (case.a, case.b))
    return lambda: recurrent_gdn_decode(qkv, a, b, case.A_log, case.dt_bias, case.pool, case.slots)
