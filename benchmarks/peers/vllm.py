"""vLLM's Triton kernels, as its GDN layers call them."""

import torch

from benchmarks.cases import Case
from benchmarks.contender import Call, NotServed, tokens_of
from benchmarks.rows import Row

NAME = "vLLM"
PACKAGE = "vllm"


def make_call(row: Row, case: Case) -> Call:
    if row.name == "train":
        raise NotServed("no gradient")
    if row.name == "verify_once":
        raise NotServed("its step of several tokens writes the state after each")
    if row.name in ("prefill", "prefill_serving"):
        return prefill(row, case)
    return step(row, case)


def prefill(row: Row, case: Case) -> Call:
    from vllm.third_party.flash_linear_attention.ops.chunk import chunk_gated_delta_rule
    from vllm.third_party.flash_linear_attention.ops.fused_gdn_prefill_post_conv import (
        fused_post_conv_prep,
    )

    if row.name == "prefill":
        return lambda: chunk_gated_delta_rule(*tokens_of(case), output_final_state=True)
    slots = case.slots.long()
    (H, K), V = case.q.shape[2:], case.v.shape[-1]
    qkv, a, b = (x.flatten(0, 1) for x in (case.qkv, case.a, case.b))

    def serve() -> object:
        tokens = fused_post_conv_prep(
            qkv, a, b, case.A_log, case.dt_bias, num_k_heads=H, head_k_dim=K, head_v_dim=V
        )
        o, state = chunk_gated_delta_rule(
            *(x.unflatten(0, (row.N, row.T)) for x in tokens),
            initial_state=case.pool[slots],
            output_final_state=True,
        )
        case.pool.index_copy_(0, slots, state.to(case.pool.dtype))
        return o

    return serve


def step(row: Row, case: Case) -> Call:
    from vllm.third_party.flash_linear_attention.ops.fused_recurrent import (
        fused_recurrent_gated_delta_rule_packed_decode,
    )
    from vllm.third_party.flash_linear_attention.ops.fused_sigmoid_gating import (
        fused_sigmoid_gating_delta_rule_update,
    )

    if row.name == "decode":
        qkv, a, b = (x[:, 0] for x in (case.qkv, case.a, case.b))
        out = torch.empty_like(case.v)
        return lambda: fused_recurrent_gated_delta_rule_packed_decode(
            qkv,
            a,
            b,
            case.A_log,
            case.dt_bias,
            case.q.shape[-1] ** -0.5,
            case.pool,
            out,
            case.slots,
            use_qk_l2norm_in_kernel=True,
        )[0]
    q, k, v = (x.contiguous().flatten(0, 1)[None] for x in case.raw)
    a, b = (x.flatten(0, 1) for x in (case.a, case.b))
    return lambda: fused_sigmoid_gating_delta_rule_update(
        case.A_log,
        a,
        b,
        case.dt_bias,
        q,
        k,
        v,
        initial_state=case.pool,
        inplace_final_state=True,
        cu_seqlens=case.cu_seqlens,
        ssm_state_indices=case.table,
        num_accepted_tokens=case.accepted,
        use_qk_l2norm_in_kernel=True,
    )[0]
