"""What the lowerings generate for a GPU that is not there: fused, in place, for every length."""

import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import cu_seqlens, indices, make_convolution, make_inputs, make_state
from torch.nn.functional import silu

import gdn_ops
import lowering
from lowering import cache_key, rules
from lowering.fake_gpu import generate

ROOT = Path(__file__).parents[1]
H, HV, K, V = 2, 4, 64, 64

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def _tokens(B, T, dtype=torch.bfloat16):
    return make_inputs(B, T, H, HV, K, V, dtype)


def decode(q, k, v, g, beta, pool, slots, z, w):
    """A decode step and what follows it in a model: gate, projection, a second consumer."""
    o = gdn_ops.recurrent_(q, k, v, g, beta, pool, slots, use_qk_l2norm=True)
    gated = o * silu(z)
    return gated.flatten(2) @ w, gated.float().abs()


def _decode_inputs(B=3):
    tokens = _tokens(B, 1)
    w = torch.randn(HV * V, 32, dtype=torch.bfloat16)
    return (*tokens, make_state(9, HV, V, K), indices([3, 1, -1][:B]), torch.ones_like(tokens.v), w)


def _templates(module):
    return [launch.kernel for launch in module.launches if launch.kernel.kind == "template"]


def _allocated(code):
    """Elements of each buffer that a generated module allocates, where they are numbers."""
    sizes = re.findall(r"= empty_strided_cuda\(\(([\d, ]+)\)", code)
    return [torch.Size(int(x) for x in size.split(",") if x.strip()).numel() for size in sizes]


def test_a_decode_step_is_one_template_with_its_epilogue_and_one_product():
    (module,) = generate(decode, _decode_inputs())
    (kernel,) = _templates(module)
    assert [launch.kernel.kind for launch in module.launches] == ["template"]
    assert "recurrent_" in kernel.name
    assert "silu" in kernel.name
    assert module.code.count("extern_kernels.") == 1


def gated_step(q, k, v, a, b, A_log, dt_bias, pool, *rows):
    """A step from raw gates, as a layer calls it."""
    g, beta = gdn_ops.gdn_gate(a, A_log, dt_bias), b.sigmoid()
    return gdn_ops.recurrent_(q, k, v, g, beta, pool, *rows)


def _gated_inputs(T=1, B=3):
    tokens = _tokens(B, T)
    gates = torch.randn(2, B, T, HV, dtype=torch.bfloat16)
    return (*tokens[:3], *gates, *torch.rand(2, HV), make_state(9, HV, V, K))


@pytest.mark.parametrize("T", [1, 4])
def test_a_step_computes_its_gates_itself(T):
    """One launch and one allocation, the output: no tensor of decays or of beta."""
    (module,) = generate(gated_step, (*_gated_inputs(T), indices([3, 1, -1])))
    ((name,),) = [[launch.kernel.name for launch in module.launches]]
    for operation in ("recurrent_", "softplus", "sigmoid"):
        assert operation in name
    assert _allocated(module.code) == [3 * T * HV * V]


def test_gates_that_others_read_are_computed_for_them_too():
    def step(*args):
        return gated_step(*args), args[4].sigmoid()

    (module,) = generate(step, _gated_inputs(B=9))
    kinds = [launch.kernel.kind for launch in module.launches]
    assert sorted(kinds) == ["pointwise", "template"]


def test_a_gate_of_the_state_is_computed_before_the_state_is_written():
    """One program would read what another has written."""

    def step(q, k, v, a, b, A_log, dt_bias, pool):
        return gated_step(q, k, v, a, b + pool[:, :, :1, 0].mT, A_log, dt_bias, pool)

    (module,) = generate(step, _gated_inputs(B=9))
    kinds = [launch.kernel.kind for launch in module.launches]
    assert kinds == ["pointwise", "template"]
    assert "sigmoid" in module.launches[0].kernel.name


def test_exact_bits_do_not_depend_on_where_gates_are_computed():
    def step(*args):
        g, beta = gdn_ops.gdn_gate(args[3], *args[5:7]), args[4].sigmoid()
        return gdn_ops.recurrent_(*args[:3], g, beta, args[7], exact=True)

    (module,) = generate(step, _gated_inputs(B=9))
    assert len(_templates(module)) == 1
    assert "sigmoid" not in _templates(module)[0].name


def test_a_kernel_is_named_after_its_stage_and_what_it_does_and_not_what_makes_its_inputs():
    def layer(q, k, v, g, beta, z):
        o, _ = gdn_ops.chunk(q.exp(), k, v, g, beta.sigmoid())
        return o * z.tanh()

    tokens = _tokens(2, 70)
    (module,) = generate(layer, (*tokens, torch.ones_like(tokens.v)))
    names = [re.sub(r"_\d+$", "", kernel.name) for kernel in _templates(module)]
    assert names == [
        "triton_tem_fused_chunk_prepare_sigmoid",
        "triton_tem_fused_chunk_mul_scan_tanh",
    ]


def test_a_pool_is_updated_where_it_is():
    """No copy of it, and no buffer of its size."""
    from torch._inductor.fx_passes.reinplace import ReinplaceCounters  # noqa: TID251

    ReinplaceCounters.clear()
    (module,) = generate(decode, _decode_inputs())
    pool = make_state(9, HV, V, K)
    assert all(size < pool.numel() for size in _allocated(module.code))
    assert "copy_(" not in module.code
    assert sum(ReinplaceCounters._values.values()) == 0


def test_layers_may_share_one_pool_and_views_of_one_base():
    """Two steps on two views of one tensor: two templates, no copy."""

    def layers(q, k, v, g, beta, pages):
        o = gdn_ops.recurrent_(q, k, v, g, beta, pages[0])
        return gdn_ops.recurrent_(q, k, o, g, beta, pages[1])

    pages = make_state(2 * 5, HV, V, K).view(2, 5, HV, V, K)
    (module,) = generate(layers, (*_tokens(3, 1), pages))
    assert len(_templates(module)) == 2
    assert all(size < pages[0].numel() for size in _allocated(module.code))


def test_a_pool_in_a_module_is_updated_where_it_is():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("pool", make_state(5, HV, V, K))

        def forward(self, *tokens):
            return gdn_ops.recurrent_(*tokens, self.pool)

    with torch.no_grad():
        (module,) = generate(Layer(), _tokens(3, 1))
    assert len(_templates(module)) == 1
    assert all(size < 5 * HV * V * K for size in _allocated(module.code))


def test_a_value_of_the_pool_that_is_read_before_the_step_needs_no_copy():
    def early_read(q, k, v, g, beta, pool):
        before = pool.sum((-1, -2))
        o = gdn_ops.recurrent_(q, k, v, g, beta, pool)
        return o, before

    (module,) = generate(early_read, (*_tokens(3, 1), make_state(3, HV, V, K)))
    kinds = [launch.kernel.kind for launch in module.launches]
    assert kinds.index("template") == len(kinds) - 1, "the sum comes first, so no copy is needed"
    assert all(size < 3 * HV * V * K for size in _allocated(module.code))


def test_an_early_read_that_is_combined_with_what_comes_after_the_step_copies_the_pool():
    """The trap of docs/design.md; without Inductor's reordering there is none."""

    def early_read(q, k, v, g, beta, pool):
        before = pool.sum((-1, -2))
        o = gdn_ops.recurrent_(q, k, v, g, beta, pool)
        return o + before[:, None, :, None]

    arguments = (*_tokens(3, 1), make_state(3, HV, V, K))
    copied, kept = (
        generate(early_read, arguments, options={"reorder_for_locality": reorder})[0]
        for reorder in (True, False)
    )
    assert [launch.kernel.kind for launch in kept.launches] == ["reduction", "template"]
    assert max(_allocated(kept.code)) < 3 * HV * V * K
    assert max(_allocated(copied.code)) == 3 * HV * V * K


@pytest.mark.parametrize("T", [1, 5], ids=["decode", "many"])
def test_one_code_serves_every_batch_and_length(T):
    def layer(q, k, v, g, beta, z):
        o, state = gdn_ops.recurrent(q, k, v, g, beta)
        return o * silu(z), state

    tokens = _tokens(3, T)
    inputs = [x.clone() for x in (*tokens, torch.ones_like(tokens.v))]
    for x in inputs:
        for dimension in (0, 1) if T > 1 else (0,):
            torch._dynamo.mark_dynamic(x, dimension)
    (module,) = generate(layer, inputs)
    assert [launch.kernel.kind for launch in module.launches] == ["template"]
    numbers = [x for x in module.inputs if isinstance(x, int)]
    assert sorted(numbers) == sorted([3, T] if T > 1 else [3])


def test_cuda_graphs_have_no_reason_to_skip_a_verify_step():
    def verify(q, k, v, g, beta, pool, table, accepted):
        return gdn_ops.recurrent_(q, k, v, g, beta, pool, table, accepted)

    pool = make_state(12, HV, V, K)
    torch._dynamo.mark_static_address(pool, guard=False)
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    arguments = (*_tokens(3, 4), pool, table, indices([1, 4, 2]))
    (module,) = generate(verify, arguments, mode="reduce-overhead")
    assert len(_templates(module)) == 1
    assert module.cudagraph_skips == []


def verify(q, k, v, g, beta, pool, slots, z):
    return gdn_ops.recurrent_(q, k, v, g, beta, pool, slots, use_qk_l2norm=True) * silu(z)


def _verify_inputs(T):
    tokens = _tokens(3, T)
    return (*tokens, make_state(9, HV, V, K), indices([3, 1, -1]), torch.ones_like(tokens.v))


def test_a_few_tokens_with_one_write_are_a_template_of_their_own_with_its_epilogue():
    (module,) = generate(verify, _verify_inputs(8))
    (kernel,) = _templates(module)
    assert [launch.kernel.kind for launch in module.launches] == ["template"]
    assert "# gdn_recurrent_verify:" in module.code
    assert "silu" in kernel.name
    assert "def walk_token(" in module.code
    assert all(size < 9 * HV * V * K for size in _allocated(module.code))


def test_a_number_of_tokens_that_is_not_known_goes_token_by_token():
    inputs = _verify_inputs(8)
    for x in (*inputs[:5], inputs[-1]):
        torch._dynamo.mark_dynamic(x, 1)
    (module,) = generate(verify, inputs)
    assert "# gdn_recurrent:" in module.code


def test_packed_rows_do_not_synchronise():
    def packed(q, k, v, g, beta, bounds):
        return gdn_ops.recurrent(q, k, v, g, beta, None, bounds)

    (module,) = generate(packed, (*_tokens(1, 12), cu_seqlens([5, 0, 7])))
    assert [launch.kernel.kind for launch in module.launches] == ["template"]
    for word in (".item()", ".tolist()", ".cpu()", "synchronize"):
        assert word not in module.code


def test_generated_kernels_are_complete_and_say_what_they_are():
    (module,) = generate(decode, _decode_inputs())
    for text in ("# gdn_recurrent:", "def delta_step(", "def inverse_norm(", "# The slots that"):
        assert text in module.code
    assert "gdn_ops" not in re.sub(r"#.*", "", module.code)


def test_the_log_tells_what_was_chosen_and_what_was_fused(caplog):
    with caplog.at_level(logging.DEBUG, logger="lowering"):
        generate(decode, _decode_inputs())
    (told,) = [r.getMessage() for r in caplog.records if "fused: " in r.getMessage()]
    assert re.match(r"gdn_recurrent: BV=\d+, .*num_warps=1, num_stages=1, fused: aten\.", told)
    # silu, and the cast of the second consumer.
    assert "aten.exp" in told or "aten.sigmoid" in told
    assert "prims.convert_element_type" in told


@pytest.mark.parametrize(
    ("operator", "inputs", "remedy"),
    [
        ("recurrent", {"dtype": torch.float64}, "pass q in a smaller dtype"),
        ("chunk", {"dtype": torch.float64}, "pass q in a smaller dtype"),
        ("chunk", {"kda": True}, "pass g of shape [B, T, HV], or call recurrent or recurrent_"),
    ],
    ids=["recurrent-float64", "chunk-float64", "chunk-decay-per-channel"],
)
def test_what_no_kernel_serves_falls_back_and_says_what_to_change(operator, inputs, remedy, caplog):
    rules._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="lowering"):
        (module,) = generate(getattr(gdn_ops, operator), make_inputs(2, 3, H, HV, K, V, **inputs))
    assert f"torch.ops.gdn.{operator}.default(" in module.code
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert said.startswith(f"gdn::{operator} stays an opaque call: the kernels ")
    assert remedy in said


@pytest.mark.parametrize("operator", ["chunk", "causal_conv1d"])
def test_on_a_cpu_the_log_says_where_there_are_kernels(operator, caplog, monkeypatch, tmp_path):
    inputs = make_inputs(1, 3, H, HV, K, V) if operator == "chunk" else make_convolution(1, 3, 8, 4)
    rules._say_once.cache_clear()
    # What an earlier run has cached is not lowered again.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with caplog.at_level(logging.INFO, logger="lowering"), torch.no_grad():
        torch.compile(getattr(gdn_ops, operator), fullgraph=True)(*inputs)
    (said,) = [r.getMessage() for r in caplog.records if r.name == "lowering.rules"]
    assert said == (
        f"gdn::{operator} stays an opaque call: there are no kernels for cpu; move the inputs to a "
        "CUDA device, or keep the eager operator"
    )


@torch.compiler.config.patch(cache_key_tag="mine")
def test_registering_is_idempotent_and_leaves_no_trace():
    lowering.unregister()
    assert torch.compiler.config.cache_key_tag == "mine"
    lowering.register()
    lowering.register()
    assert torch.compiler.config.cache_key_tag == f"mine|gdn-ops:{cache_key.fingerprint()}"
    lowering.unregister()
    assert torch.compiler.config.cache_key_tag == "mine"
    (module,) = generate(decode, _decode_inputs())
    assert "torch.ops.gdn.recurrent_.default(" in module.code
    lowering.register()
    (module,) = generate(decode, _decode_inputs())
    assert len(_templates(module)) == 1


SCRIPT = """
import sys, torch, gdn_ops, lowering
from torch._dynamo.utils import counters
getattr(lowering, sys.argv[1])()
f = torch.compile(lambda *x: gdn_ops.recurrent(*x)[0] * 2, fullgraph=True)
f(*torch.randn(2, 1, 3, 1, 4), torch.randn(1, 3, 1, 4))
print(counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.fixture
def copies(tmp_path):
    """A folder with copies of both packages."""
    for package in ("gdn_ops", "lowering"):
        shutil.copytree(ROOT / package, tmp_path / package)
    return tmp_path


def test_a_cache_is_never_stale(copies):
    """In processes of their own: neither code of another kernel is found, nor code without any."""

    def hits(switch):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(copies / "cache")}
        environment["PYTHONPATH"] = str(copies)
        command = [sys.executable, "-c", SCRIPT, switch]
        run = subprocess.run(
            command, cwd=copies, env=environment, capture_output=True, text=True, check=True
        )
        return sum(map(int, run.stdout.split()))

    assert hits("unregister") == 0
    assert hits("register") == 0
    assert hits("register") > 0
    with (copies / "gdn_ops" / "kernels" / "recurrent.py").open("a") as file:
        file.write("# changed\n")
    assert hits("register") == 0


@pytest.mark.parametrize(
    "changed", ["gdn_ops/kernels/recurrent.py", "gdn_ops/kernels/configs.py", "lowering/chunk.py"]
)
def test_a_change_of_a_kernel_a_config_or_a_lowering_changes_the_fingerprint(changed, copies):
    def fingerprint():
        return runpy.run_path(str(copies / "lowering" / "cache_key.py"))["fingerprint"]()

    before = fingerprint()
    assert before == fingerprint()
    with (copies / changed).open("a") as file:
        file.write("# changed\n")
    assert fingerprint() != before
