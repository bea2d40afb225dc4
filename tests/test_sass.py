"""Facts of kernels that are compiled for GPUs that are not there."""

import pytest

pytest.importorskip("triton")

from kernels_to_compile import product, scale

from lowering.arch import ARCHS
from lowering.fake_gpu import generate
from lowering.sass import NVIDIA, _parse, compile_generated, compile_kernel

POINTERS = {"x": "*fp32", "y": "*fp32", "n": "i32"}
MATRICES = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "n": "i32"}
# One instruction of a tensor core, in each architecture's own words.
TENSOR_CORE = {
    "sm_80": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "gfx942": "v_mfma_f32_32x32x8_bf16",
}


@pytest.mark.parametrize("arch", ARCHS)
def test_aligned_memory_is_accessed_16_bytes_at_a_time(arch):
    facts = compile_kernel(scale, POINTERS, {"BLOCK": 1024}, arch=arch, divisible=["x", "y", "n"])
    load, store = (
        ("global_load_dwordx4", "global_store_dwordx4")
        if ARCHS[arch].is_amd
        else ("LDG.128", "STG.128")
    )
    assert facts.opcodes[load] >= 1
    assert facts.opcodes[store] >= 1
    assert facts.spills == facts.stack == facts.shared == 0
    assert 0 < facts.registers <= 32


def test_an_odd_size_is_accessed_4_bytes_at_a_time():
    facts = compile_kernel(scale, POINTERS, {"BLOCK": 1024}, arch="sm_90")
    assert facts.opcodes["LDG.128"] == 0
    assert facts.opcodes["LDG.32"] == facts.opcodes["LDG"] > 0


@pytest.mark.parametrize("arch", TENSOR_CORE)
def test_a_product_in_a_loop_runs_on_tensor_cores(arch):
    facts = compile_kernel(product, MATRICES, {"K": 4096}, arch=arch)
    assert facts.opcodes[TENSOR_CORE[arch]] > 0
    assert any(loop[TENSOR_CORE[arch]] for loop in facts.loops)
    assert facts.shared > 0


def test_too_many_values_for_the_registers_are_counted_as_spills():
    roomy = compile_kernel(product, MATRICES, {"K": 4096}, arch="sm_80")
    assert roomy.spills == roomy.spills_in_loops == roomy.stack == 0
    crowded = compile_kernel(
        product, MATRICES, {"K": 4096}, arch="sm_80", options={"maxnreg": roomy.registers // 2}
    )
    assert crowded.registers <= roomy.registers // 2
    assert crowded.spills >= crowded.spills_in_loops > 0
    assert crowded.stack > 0


@pytest.mark.parametrize(("num_warps", "blocks"), [(1, 32), (4, 16), (16, 4)])
def test_few_registers_leave_a_multiprocessor_full_of_blocks_or_threads(num_warps, blocks):
    facts = compile_kernel(
        scale, POINTERS, {"BLOCK": 32 * num_warps}, arch="sm_80", num_warps=num_warps
    )
    assert facts.occupancy == blocks


def test_a_wait_that_tries_again_from_past_the_end_is_no_loop():
    text = """
.L_x_0:
        /*0000*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   FADD R0, R0, R1 ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0060*/              @!P0 BRA `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_1) ;
"""
    assert _parse(text, NVIDIA)[1] == [(0, 3), (5, 6)]


def test_a_kernel_of_a_generated_module_compiles():
    import torch

    (module,) = generate(lambda x: torch.softmax(x, -1), (torch.randn(64, 512),), arch="sm_100")
    (launch,) = module.launches
    facts = [compile_generated(launch.kernel, c, "sm_100") for c in launch.kernel.configs]
    assert all(f.spills == 0 and f.opcodes["MUFU"] for f in facts)


def test_what_cannot_be_compiled_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"signature must type \['n'\]"):
        compile_kernel(scale, {"x": "*fp32", "y": "*fp32"}, {"BLOCK": 64})
    with pytest.raises(ValueError, match="arch must be one of"):
        compile_kernel(scale, POINTERS, {"BLOCK": 64}, arch="sm_1")
    with pytest.raises(RuntimeError, match=r"fn must be a triton\.jit function"):
        compile_kernel(max, POINTERS)
