"""What a whole Qwen3-Next model becomes on sm_90, attention and mixture of experts included.

Of those parts the lists say what Inductor makes, whatever it is.
"""

import functools

import expecttest
import pytest
import torch
from lowered_layers import filled_cache, inventory, model_of, pinned, summary, template_names
from tiny_models import new_cache, tokens

from gdn_ops.integrations.transformers import use_gdn_ops
from lowering.fake_gpu import generate
from lowering.generated import library_calls

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@functools.cache
def model_in(phase):
    """The graphs of a model with attention and a mixture of experts."""
    model = model_of(torch.bfloat16, experts=4)
    with use_gdn_ops(), torch.set_grad_enabled(phase == "training"):
        if phase == "decode":
            call = {"input_ids": tokens(3, 1), "past_key_values": filled_cache(model, 3)}
            return generate(model, (), call, mode="reduce-overhead")
        ids = tokens(2, 70)
        if phase == "prefill":
            return generate(model, (ids,), {"past_key_values": new_cache("static", model, 128)})
        return generate(model, (), {"input_ids": ids, "labels": ids, "use_cache": False})


@pytest.mark.parametrize("phase", ["decode", "prefill", "training"])
def test_no_operator_stays_an_opaque_call(phase):
    """One graph, or two in training, and in them no call of an operator of this package."""
    modules = model_in(phase)
    assert [module.phase for module in modules] in (["inference"], ["forward", "backward"])
    for module in modules:
        assert not [name for name in library_calls(module.code) if "ops.gdn." in name]
        assert template_names(module)


def test_cuda_graphs_have_no_reason_to_skip_a_decode_step():
    (module,) = model_in("decode")
    assert module.cudagraph_skips == []


@pinned
def test_kernels_of_a_decode_step():
    (module,) = model_in("decode")
    expecttest.assert_expected_inline(
        inventory(module),
        """\
pointwise: arange add
pointwise: arange
pointwise: arange
reduction: embedding pow mean add rsqrt mul
extern_kernels.mm
extern_kernels.mm
pointwise: cat
template: gdn_causal_conv1d
template: gdn_recurrent
reduction: pow mean add rsqrt mul silu
extern_kernels.mm
reduction: embedding add pow mean rsqrt mul
extern_kernels.mm
extern_kernels.mm
pointwise: prims.prepare_softmax_online _softmax
torch.ops.aten.topk.default
reduction: sort
torch.ops.aten.histc.default
reduction: cumsum
extern_kernels.mm
extern_kernels.mm
pointwise: silu mul
extern_kernels.mm
pointwise: embedding add pow mean rsqrt mul sort floor_divide index _grouped_mm
extern_kernels._grouped_mm
pointwise: silu mul _grouped_mm
extern_kernels._grouped_mm
reduction: embedding add sort sum div index mul sigmoid pow mean rsqrt
extern_kernels.mm
reduction: pow mean
pointwise: arange add mul cat cos sin pow mean rsqrt neg
pointwise: pow mean add rsqrt mul cat
extern_kernels.mm
extern_kernels.mm
reduction: pow mean
pointwise: pow mean add rsqrt mul arange cat cos neg sin
pointwise: pow mean add rsqrt mul cat
pointwise: mul
extern_kernels.bmm
reduction: arange add le scalar_tensor where _safe_softmax prims.prepare_softmax_online
pointwise: add
pointwise: unsqueeze expand clone _unsafe_view _to_copy
extern_kernels.bmm
pointwise: sigmoid mul
extern_kernels.mm
reduction: add pow mean rsqrt mul
extern_kernels.mm
extern_kernels.mm
pointwise: prims.prepare_softmax_online _softmax
torch.ops.aten.topk.default
reduction: sort
torch.ops.aten.histc.default
reduction: cumsum
extern_kernels.mm
extern_kernels.mm
pointwise: silu mul
extern_kernels.mm
pointwise: embedding add pow mean rsqrt mul sort floor_divide index _grouped_mm
extern_kernels._grouped_mm
pointwise: silu mul _grouped_mm
extern_kernels._grouped_mm
reduction: add sort sum div index mul sigmoid pow mean rsqrt
extern_kernels.mm""",
    )


@pinned
def test_kernels_of_prefill_and_training():
    modules = [*model_in("prefill"), *model_in("training")]
    expecttest.assert_expected_inline(
        "\n\n".join(map(summary, modules)),
        """\
inference:
template gdn_causal_conv1d
template gdn_chunk_prepare
template gdn_chunk_scan
4 extern_kernels._grouped_mm
2 extern_kernels.bmm
18 extern_kernels.mm
23 pointwise
13 reduction
2 torch.ops.aten.histc.default
2 torch.ops.aten.topk.default

forward:
template gdn_causal_conv1d
template gdn_chunk_prepare
template gdn_chunk_scan
4 extern_kernels._grouped_mm
2 extern_kernels.bmm
18 extern_kernels.mm
23 pointwise
16 reduction
2 torch.ops.aten.histc.default
2 torch.ops.aten.topk.default

backward:
template gdn_chunk_prepare
template gdn_chunk_backward_replay
template gdn_chunk_backward_reverse
template gdn_chunk_backward_gradients
template gdn_causal_conv1d_backward
8 extern_kernels._grouped_mm
4 extern_kernels.bmm
34 extern_kernels.mm
34 pointwise
31 reduction""",
    )
