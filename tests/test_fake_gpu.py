"""Code for a GPU is generated where there is none, and nothing of it stays behind."""

import functools
import os
from pathlib import Path

import pytest
import torch
from torch._dynamo import device_interface
from torch.nn import functional as F
from torch.utils._triton import has_triton

from lowering.arch import ARCHS
from lowering.fake_gpu import fake_gpu, generate
from lowering.generated import library_calls

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def project(x, w):
    return F.silu(x @ w) * 2


def accumulate_(x, pool):
    pool += x
    return pool * 2


def _example():
    return torch.randn(5, 16), torch.randn(16, 32)


def _state_of_torch():
    """What a fake GPU touches: every answer, every patched name, the environment, the caches."""
    from triton.runtime import driver

    owners = (torch.cuda, device_interface.CudaInterface, device_interface.CudaInterface.Worker)
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/nonexistent"))
    return {
        "answers": (torch.cuda.is_available(), torch.cuda.device_count(), has_triton()),
        "accelerator": torch.accelerator.current_accelerator(),
        "versions": (torch.version.cuda, torch.version.hip),
        "names": [dict(vars(owner)) for owner in owners],
        "interfaces": dict(device_interface.device_interfaces),
        "driver": dict(vars(driver)),
        "environment": dict(os.environ),
        "cached": sorted(cache.rglob("*")),
        "multithreading": torch.autograd.is_multithreading_enabled()
        if hasattr(torch.autograd, "is_multithreading_enabled")
        else torch._C._is_multithreading_enabled(),
    }


def test_a_fake_gpu_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    generate(project, _example())  # what is imported and traced once, is
    before = _state_of_torch()
    for arch in ("sm_90", "gfx942"):
        generate(torch.nn.Linear(16, 32), (torch.randn(5, 16),), arch=arch)
        assert _state_of_torch() == before
    with pytest.raises(ZeroDivisionError), fake_gpu():
        raise ZeroDivisionError
    assert _state_of_torch() == before
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        torch.empty(1, device="cuda")


def test_a_function_that_was_generated_for_still_computes_when_it_is_compiled():
    x, w = _example()
    generate(project, (x, w))
    compiled = torch.compile(project, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), project(x, w))
    generate(project, (x, w))
    torch.testing.assert_close(compiled(x, w), project(x, w))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_code_is_for_the_architecture(arch):
    (module,) = generate(project, _example(), arch=arch)
    gpu = ARCHS[arch]
    kind = f"type='{'hip' if gpu.is_amd else 'cuda'}'"
    assert f"{kind}, index=0, multi_processor_count={gpu.multiprocessors}" in module.code
    assert f"warp_size={gpu.warp}" in module.code
    assert [launch.kernel.kind for launch in module.launches] == ["pointwise"]
    assert library_calls(module.code) == {"extern_kernels.mm": 1}


def test_the_same_code_comes_again():
    def body(code):
        return code.split("\n", 1)[1]  # the first line counts the graphs of the process

    first, second = (generate(project, _example())[0].code for _ in range(2))
    assert body(first) == body(second)


def test_inputs_are_the_caller_s_tensors_in_the_order_of_the_module():
    x, w = _example()
    (module,) = generate(lambda x, w: w.sin() + x.sum(), (x, w))
    assert {id(t) for t in module.inputs} == {id(x), id(w)}


def test_tensors_on_meta_will_do():
    layer = torch.nn.Linear(1 << 14, 1 << 14, device="meta")
    with torch.no_grad():
        (module,) = generate(layer, (torch.empty(4, 1 << 14, device="meta"),))
    assert library_calls(module.code)


def test_a_dimension_marked_dynamic_is_a_symbol():
    x, w = _example()
    torch._dynamo.mark_dynamic(x, 0)
    (module,) = generate(project, (x, w))
    assert any(isinstance(argument, int) for argument in module.inputs)
    assert module.launches[0].args["xnumel"] == 5 * 32


def test_a_backward_is_generated_where_a_result_has_a_gradient():
    x, w = _example()
    forward, backward = generate(project, (x, w.requires_grad_()))
    assert (forward.phase, backward.phase) == ("forward", "backward")
    with torch.no_grad():
        (module,) = generate(project, (x, w))
    assert module.phase == "inference"


def test_layers_of_one_pool_stay_views_of_one_pool():
    pool = torch.zeros(3, 4, 8)
    seen = []

    def step(x, first, second):
        seen.append(first.untyped_storage()._cdata == second.untyped_storage()._cdata)
        return accumulate_(x, first) + accumulate_(x, second)

    generate(step, (torch.randn(4, 8), pool[0], pool[1]), fullgraph=False)
    assert all(seen)
    assert torch.equal(pool, torch.zeros(3, 4, 8))


def test_a_module_keeps_its_own_tensors():
    layer = torch.nn.Linear(4, 4)
    before = dict(layer.named_parameters())
    generate(functools.partial(layer.forward), (torch.randn(2, 4),))
    assert all(p is before[name] and p.device.type == "cpu" for name, p in layer.named_parameters())


def test_cuda_graphs_are_skipped_for_a_pool_that_may_move():
    x = torch.randn(4, 8)
    moving, static = torch.zeros(4, 8), torch.zeros(4, 8)
    torch._dynamo.mark_static_address(static, guard=False)
    (module,) = generate(accumulate_, (x, moving), mode="reduce-overhead")
    assert module.cudagraph_skips == ["skipping cudagraphs due to mutated inputs (1 instances)"]
    (module,) = generate(accumulate_, (x, static), mode="reduce-overhead")
    assert module.cudagraph_skips == []


def attend(q, mask):
    return F.scaled_dot_product_attention(q, q, q, mask)


def test_attention_with_a_mask_is_generated_without_a_driver():
    """A CUDA build of torch asks for the version of cuDNN, once in a process."""
    q, mask = torch.randn(2, 4, 16, 32), torch.ones(2, 1, 16, 16, dtype=torch.bool)
    (module,) = generate(attend, (q, mask))
    assert module.launches


def test_each_graph_gives_a_module():
    def broken(x):
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    assert len(generate(broken, (torch.randn(4),), fullgraph=False)) == 2


def test_what_cannot_be_generated_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"arch must be one of sm_80, .*, got 'sm_70'"):
        generate(project, _example(), arch="sm_70")
    with pytest.raises(ValueError, match=r"generate: mode must be .*, got 'max-autotune'"):
        generate(project, _example(), mode="max-autotune")
