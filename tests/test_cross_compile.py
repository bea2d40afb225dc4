"""What the kernels become on GPUs that nobody here has: registers, tensor cores, widths, fit.

Each kernel in the configurations that its launcher and its lowering choose at the sizes of a model,
16 and 32 heads of 128. All flags are compiled for sm_90, a selection for the other architectures.
"""

import os
import re
import types
from dataclasses import dataclass, replace
from unittest import mock

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from calls_to_compile import BF16, CALLS
from launches_to_compile import KERNELS, LAYERS, Compiler

from benchmarks.static.launches import Launch, record
from gdn_ops.kernels import chunk
from gdn_ops.kernels.configs import TRITON
from lowering import _inductor
from lowering import causal_conv1d as lowered_conv
from lowering import chunk as lowered_chunk
from lowering import recurrent as lowered_recurrent
from lowering.arch import find_arch

# Compiled for every architecture; sm_89 has the code of sm_80, and less shared memory.
EVERYWHERE = (
    *("decode fp32", "verify", "prefill", "prefill of one", "prefill segments", "gradient"),
    *("convolve", "convolve token"),
)
ARCHS = ("sm_90", "sm_80", "sm_100", "gfx942")
# For these also what max_autotune would time.
TIMED = ("decode fp32", "decode bf16", "prefill plain", "convolve")
FUSED = ("USE_DESCRIPTOR_STORE", False)
# The stage that gradients share with a prefill of the same flags, but for one factor.
SHARED = ("gradient", "gradient without norm", "gradient fp32", "gradient packed")


@dataclass(frozen=True)
class Case:
    """A kernel of a call; or of a layer, by its name there."""

    call: str
    kernel: str
    arch: str
    launch: Launch | None = None

    def __str__(self):
        return f"{self.call}-{self.kernel}-{self.arch}".replace(" ", "_")

    def facts(self, compiler):
        """A future of the facts."""
        if self.launch is None:
            return compiler.ask_for_layer(self.call, self.arch)
        return compiler.ask(self.launch, self.arch)


def _recorded():
    for arch in ARCHS:
        for call in CALLS if arch == "sm_90" else EVERYWHERE:
            for launch in record(CALLS[call], arch):
                if call in SHARED and launch.kernel == "prepare":
                    continue
                yield Case(call, launch.kernel, arch, launch)
                if arch == "sm_90" and call in TIMED:
                    for config in _configs(launch)[1:]:
                        sizes = [str(size) for _, size in config.tiles if size is not False]
                        name = f"{launch.kernel} {'x'.join(sizes)} {config.num_stages}"
                        name += " fused" * (FUSED in config.tiles)
                        yield Case(call, name, arch, launch.with_config(config))


def _configs(launch):
    """What the lowering of a launch chooses from."""
    numbers = {
        "may_autotune": lambda: True,
        "hints": list,
        "is_known": bool,
        "static_int": int,
    }
    with mock.patch.multiple(_inductor, **numbers):
        if launch.kernel == "recurrent":
            K, V, BV = (launch.args[name] for name in ("K", "V", "BV"))
            is_pinned = launch.args["EXACT"] or launch.args["IS_TABLE"]
            heads = None if is_pinned else launch.programs * BV // V
            return lowered_recurrent._configs(K, V, _node(launch.args["final_state"]), heads)
        if launch.kernel == "causal_conv1d":
            x, weight, written, bounds = (
                launch.args[name] for name in ("x", "weight", "final_state", "cu_seqlens")
            )
            sequences = len(x) if bounds is None else len(bounds) - 1
            nodes = map(_node, (x, weight, written))
            return lowered_conv._configs(*nodes, sequences, bounds is not None)
        if launch.kernel == "scan":
            BT, BK, BV = (launch.args[name] for name in ("BT", "BK", "BV"))
            late = chunk.Tiles(BT, BK, BV, launch.num_warps, launch.num_stages)
            found = lowered_chunk._scan_configs(late, BF16, is_late=True)
            # And those where something is fused into the output.
            for config in lowered_chunk._scan_configs(chunk.Tiles(BT, BK, 64, 4, 2), BF16, False):
                found.append(replace(config, tiles=(*config.tiles, FUSED)))
            return found
        if launch.kernel == "prepare":
            return [None]  # one, the launcher's
    raise AssertionError(launch.kernel)


def _node(x):
    """What a lowering asks of a node."""
    return types.SimpleNamespace(
        get_dtype=lambda: x.dtype, get_size=lambda: x.shape, get_stride=x.stride
    )


LAUNCHES = list(_recorded())
# The kernels that a layer is lowered to. Their prepare is that of the launchers.
LOWERED = [Case(layer, kernel, "sm_90") for layer in LAYERS for kernel in KERNELS[layer]]
PRODUCTS = [case for case in LAUNCHES if str(case.launch.args.get("DOT")) in ("bf16", "fp16")]


def _params(cases):
    return [pytest.param(case, id=str(case)) for case in cases]


@pytest.fixture(scope="module")
def compiler(request):
    """All that the chosen tests will need is under way from the first on."""
    # Of pytest-xdist each process has its share of the tests, and compiles for itself.
    is_alone = "PYTEST_XDIST_WORKER" not in os.environ
    compiler = Compiler(processes=2 if is_alone else 0)
    for item in request.session.items if is_alone else ():
        # Of a test without cases, as with a Triton that has no such kernel, there is no case.
        if item.path == request.path and isinstance(item.callspec.params["case"], Case):
            item.callspec.params["case"].facts(compiler)
    yield compiler
    compiler.close()


@pytest.fixture
def facts(compiler, case):
    found = case.facts(compiler).result()
    return found if case.launch is not None else found[case.kernel]


# The backward is tuned for sm_90 only.
TUNED = [case for case in LAUNCHES if case.arch == "sm_90" or case.call != "gradient"] + LOWERED


# Roles of warps are branches of one loop, so that all of a kernel with roles is in a loop; what
# their own loops spill has tests below.
WITH_ROLES = ("fused_hopper", "reverse_hopper", "gradients_hopper")
IN_LOOPS = [case for case in TUNED if case.kernel not in WITH_ROLES]


# One number that the loop over heads reads again, by an assembler that finds no register for it.
# Without it are only forms that begin to read tokens later: of one stage, not of two or three.
READ_AGAIN = {("prefill_fp16-prepare-sm_90", (3, 6)): 1}
# What no item changes, by programs that prepare one after another: once for each, not in products.
READ_AGAIN |= {("prefill_of_one-prepare_beside-sm_90", (3, minor)): 6 for minor in (6, 7)}


@pytest.mark.parametrize("case", _params(IN_LOOPS))
def test_no_register_is_spilled_in_a_loop(facts, case):
    assert facts.spills_in_loops == READ_AGAIN.get((str(case), TRITON), 0)


@pytest.mark.parametrize("case", _params(LAUNCHES + LOWERED))
def test_a_program_fits_its_gpu(facts, case):
    archs = [case.arch, "sm_89"] if case.arch == "sm_80" else [case.arch]
    assert facts.shared <= min(find_arch(arch).shared_per_block for arch in archs)
    assert facts.occupancy >= 1


@pytest.mark.parametrize("case", _params([c for c in LAUNCHES if c.kernel.startswith("recurrent")]))
def test_a_state_is_read_and_written_16_bytes_at_a_time(facts, case):
    """Also behind the masks of dead slots: the accesses are as many as the tile needs."""
    arch, args = find_arch(case.arch), case.launch.args
    written = args.get("final_state", args["state"])
    size = args["BV"] * args["BK"] * written.itemsize
    least = size // (16 * arch.warp * facts.num_warps)
    # Outputs of several tokens at once are as wide.
    outputs = args["BV"] * args["BR"] * args["o"].itemsize if "BR" in args else 0
    load, store = (
        ("global_load_dwordx4", "global_store_dwordx4") if arch.is_amd else ("LDG.128", "STG.128")
    )
    assert facts.opcodes[load] >= least
    assert facts.opcodes[store] == least + outputs // (16 * arch.warp)


@pytest.mark.parametrize("case", _params([c for c in LAUNCHES if c.kernel == "scan"]))
def test_a_scan_reads_and_writes_its_state_16_bytes_at_a_time(facts, case):
    """At both ends of a sequence; other tensors are read and written beside it."""
    arch, args = find_arch(case.arch), case.launch.args
    load, store = (
        ("global_load_dwordx4", "global_store_dwordx4") if arch.is_amd else ("LDG.128", "STG.128")
    )
    for name, opcode in (("state", load), ("final_state", store)):
        if args.get(name) is not None:
            size = args["BV"] * args["BK"] * args[name].itemsize
            assert facts.opcodes[opcode] >= size // (16 * arch.warp * facts.num_warps)


@pytest.mark.parametrize("case", _params([c for c in LAUNCHES if c.kernel == "scan_hopper"]))
def test_each_role_of_a_scan_for_hopper_has_its_loop_and_spills_nothing(facts, case):
    groups = case.launch.args["BV"] // 64
    few = ("prefill of one", "prefill segments", "prefill segments packed")
    assert groups == (1 if case.call in few else 2)
    walks = [loop for loop in facts.loops if loop.get("HGMMA")]
    # Where chunks are prepared beside it, a loop inside of this one waits for each.
    (load,) = [loop.opcodes for loop in facts.nest if "UTMALDG" in loop.opcodes]
    assert len(walks) == groups
    for walk in walks:
        # [64, 128] by [128, 64] twice, [64, 64] by [64, 64] twice, [64, 64] by [64, 128]; 16 deep.
        assert walk["HGMMA"] == 8 + 8 + 4 + 4 + 4
        assert walk["UTMASTG"] == 1
        assert walk.get("LDG", 0) + walk.get("STG", 0) == 0
    assert not load.get("HGMMA")
    assert facts.spills == facts.stack == 0
    # The warps of loading are rounded up to a group.
    assert facts.num_warps == 4 * groups + 4
    assert facts.registers * 32 * facts.num_warps <= find_arch("sm_90").registers


@pytest.mark.parametrize("case", _params([c for c in LAUNCHES if c.kernel == "carry_hopper"]))
def test_each_role_of_a_carry_for_hopper_has_its_loop_and_spills_nothing(facts, case):
    walks = [loop for loop in facts.loops if loop.get("HGMMA")]
    (load,) = [loop for loop in facts.loops if loop.get("UTMALDG")]
    # [64, 128] by [128, 64], [64, 64] by [64, 64], [64, 64] by [64, 128]; 16 deep.
    assert [walk["HGMMA"] for walk in walks] == [8 + 4 + 4] * 2
    assert not any(walk.get("LDG", 0) + walk.get("STG", 0) for walk in walks)
    assert not load.get("HGMMA")
    assert facts.spills == facts.stack == 0
    assert facts.num_warps == 12
    assert facts.registers * 32 * facts.num_warps <= find_arch("sm_90").registers


@pytest.mark.parametrize("case", _params([c for c in LAUNCHES if c.kernel == "fused_hopper"]))
def test_each_role_of_a_prefill_in_one_kernel_has_its_loop(facts, case):
    products = sorted(loop["HGMMA"] for loop in facts.loops if loop.get("HGMMA"))
    # Of invert two parts of [64, 64] by [64, 64], then one; of each walk what a scan has, and
    # [64, 128] by [128, 64], with norms of queries once more; 16 deep.
    norms = 8 if case.launch.args["USE_QK_L2NORM"] else 0
    # Without norms the factors of the first two chunks are a loop of each walk.
    first = [] if norms else [8, 8]
    assert products == [*first, 3 * 4, 28 + 8, 28 + 8 + norms]
    walks = [loop for loop in facts.loops if loop.get("HGMMA", 0) > 12]
    # Of 900 instructions for a chunk: an address that is not kept in a register.
    spills = [loop.get("LDL", 0) + loop.get("STL", 0) for loop in facts.loops if "HGMMA" in loop]
    assert max(spills) <= 3
    assert all(loop["UTMASTG"] == 1 for loop in walks)
    assert not any(loop.get("LDG", 0) + loop.get("STG", 0) for loop in walks)
    (load,) = [loop for loop in facts.loops if loop.get("UTMALDG")]
    assert not load.get("HGMMA")
    # It has 24 registers, and waits for most of the time.
    assert load.get("LDL", 0) + load.get("STL", 0) <= 5
    assert facts.num_warps == 16
    assert facts.registers * 32 * facts.num_warps <= find_arch("sm_90").registers


# Instructions of products in a chunk of each role that multiplies. [64, 128] by [128, 64] takes 8,
# [64, 64] by [64, 64] or by [64, 128] takes 4.
OF_ROLES = {
    "replay_hopper": lambda groups: [8 + 4 + 4] * groups,
    "reverse_hopper": lambda groups: [8] + [8 + 4 + 4 + 4 + 4] * groups,
    "gradients_hopper": lambda groups: [8 + 8 + 8 + 4 * 4 + 8] * 2,
}


@pytest.mark.parametrize("case", _params([c for c in LAUNCHES if c.kernel in OF_ROLES]))
def test_each_role_of_a_gradient_has_its_loop_and_keeps_its_sums_in_registers(facts, case):
    loops = [loop for loop in facts.loops if loop.get("HGMMA")]
    groups = case.launch.args.get("BV", 128) // 64
    assert sorted(loop["HGMMA"] for loop in loops) == OF_ROLES[case.kernel](groups)
    # Of 900 to 1500 instructions for a chunk: an address that is not kept in a register.
    assert max(loop.get("LDL", 0) + loop.get("STL", 0) for loop in loops) <= 4
    assert not any(loop.get("LDG", 0) + loop.get("STG", 0) for loop in loops)
    assert facts.registers * 32 * facts.num_warps <= find_arch("sm_90").registers


@pytest.mark.parametrize("case", _params([c for c in LAUNCHES if c.kernel == "recurrent_verify"]))
def test_a_state_is_multiplied_in_the_registers_that_loaded_it(facts, case):
    """On tensor cores, by products of one warp; shared memory has the outputs and no state."""
    size = case.launch.args["BV"] * case.launch.args["BK"] * 4
    assert facts.opcodes["HMMA"] >= 64
    assert facts.opcodes["HGMMA"] == 0
    assert facts.opcodes["LDS"] + facts.opcodes["STS"] + facts.opcodes["LDSM"] < 4
    assert facts.shared < size
    assert facts.occupancy >= 8


@pytest.mark.parametrize("case", _params(PRODUCTS))
def test_products_of_16_bit_operands_run_on_tensor_cores(facts, case):
    # A product of whole warp groups needs 64 rows, of tokens or of a state, and four warps.
    rows = min(case.launch.args["BT"], case.launch.args.get("BV", 64))
    is_large = rows == 64 and facts.num_warps >= 4
    expected = {
        "sm_80": r"HMMA$",
        "sm_90": r"HGMMA$" if is_large else r"H(G)?MMA$",
        "sm_100": r"UTCHMMA$" if is_large else r"(UTC)?HMMA$",
        "gfx942": r"v_mfma_f32_\w+_bf16",
    }[case.arch]
    assert sum(n for op, n in facts.opcodes.items() if re.match(expected, op)) >= 4


@pytest.mark.parametrize("case", _params([c for c in PRODUCTS if c.arch == "sm_90"]))
def test_no_warp_group_multiplies_by_a_narrow_transposed_operand(facts):
    """Triton reads it at wrong places: https://github.com/triton-lang/triton/issues/11366."""
    assert not re.search(r"HGMMA\.64x(8|16|24|32)x16\S* .*\.tnspB", facts.assembly)
