"""The static gate: compiled kernels are no worse than accepted, and the gate would notice."""

import dataclasses
import json
import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import torch
import triton  # noqa: TID253
from kernels_to_compile import product, scale

from benchmarks.rows import Row, bytes_moved
from benchmarks.static import __main__ as command
from benchmarks.static import accepted, model, traffic
from benchmarks.static.calls import call_of_row, integers, new, plainly, states
from benchmarks.static.collect import OPERATOR_ROWS, kernel_figures, kernels, traffic_of
from benchmarks.static.figures import DIRECTIONS, count, main_part
from benchmarks.static.launches import TorchLaunch, record, record_all
from gdn_ops.kernels import recurrent
from gdn_ops.kernels.chunk_hopper import has_gluon
from lowering.arch import find_arch
from lowering.sass import compile_kernel

ARCH = model.ARCH
KERNELS = kernels(ARCH)


@pytest.fixture(scope="module")
def figures():
    """What was accepted with the Triton at hand; the pinned one must have some."""
    if triton.__version__ != accepted.pinned_triton():
        pytest.skip("continuous tests compare with the pinned Triton; others have other code")
    return accepted.load(ARCH, triton.__version__)


def _assert_accepted(found):
    refused = [str(finding) for finding in found if finding.is_refused]
    assert not refused, "\n".join([*refused, "if meant: python -m benchmarks.static --accept"])


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_no_worse_than_accepted(name, figures):
    known = {name: figures["kernels"][name]} if name in figures["kernels"] else {}
    _assert_accepted(accepted.compare(known, {name: kernel_figures(KERNELS[name], ARCH)}))


def test_every_accepted_kernel_is_still_launched(figures):
    assert set(figures["kernels"]) == set(KERNELS)
    assert set(figures["operators"]) == {str(row) for row in OPERATOR_ROWS}


def test_no_operator_launches_or_moves_more_than_accepted(figures):
    found = {str(row): traffic_of(row, ARCH) for row in OPERATOR_ROWS}
    # Times need more kernels; ``make static`` compares them.
    known = {
        name: {key: x for key, x in figures["operators"][name].items() if key != "predicted us"}
        for name in found
    }
    _assert_accepted(accepted.compare(known, found))


def test_no_operator_moves_less_than_it_must():
    for row in OPERATOR_ROWS:
        x = traffic_of(row, ARCH)
        assert x["bytes a token"] >= x["least bytes a token"], row


def _kernel(**changes):
    known = {"registers": 168, "programs per multiprocessor": 3, "warps": 4, "opcodes": {"BAR": 9}}
    return {"prepare": known | changes}


@pytest.mark.parametrize(
    ("found", "sentences"),
    [
        (_kernel(), []),
        (
            _kernel(registers=255),
            ["prepare: registers 168 -> 255: worse"],
        ),
        (
            _kernel(**{"registers": 255, "programs per multiprocessor": 2}),
            ["prepare: registers 168 -> 255, programs per multiprocessor 3 -> 2: worse"],
        ),
        (_kernel(registers=128), ["prepare: registers 168 -> 128: better"]),
        (
            _kernel(registers=128, opcodes={"BAR": 9, "LDL": 2}),
            ["prepare: LDL 0 -> 2: worse", "prepare: registers 168 -> 128: better"],
        ),
        (_kernel(warps=8), ["prepare: warps 4 -> 8: changed"]),
        ({}, ["prepare: accepted, and launched no more: gone"]),
    ],
    ids=["same", "worse", "both worse", "better", "mixed", "changed", "gone"],
)
def test_a_change_is_said_in_one_sentence_with_its_direction(found, sentences):
    findings = accepted.compare(_kernel(), found)
    assert [str(finding) for finding in findings] == sentences
    assert [finding.is_refused for finding in findings] == ["better" not in s for s in sentences]


def test_what_was_never_accepted_is_refused():
    (finding,) = accepted.compare({}, _kernel())
    assert str(finding) == "prepare: nothing was accepted of it: new"
    assert finding.is_refused


def test_figures_come_back_from_their_file_as_they_were(tmp_path, monkeypatch, figures):
    monkeypatch.setattr(accepted, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="no figures of sm_90 were accepted with Triton"):
        accepted.load(ARCH, triton.__version__)
    path = accepted.save(ARCH, triton.__version__, figures)
    assert accepted.load(ARCH, triton.__version__) == figures
    assert json.loads(path.read_text())["triton"] == triton.__version__
    other = accepted.save(ARCH, "0.0", figures)
    assert (path.name, other.name) == ("sm_90.json", "sm_90-triton-0.0.json")
    assert accepted.load(ARCH, "0.0") == figures


def test_a_check_fails_for_the_worse_and_accepting_a_part_leaves_the_rest(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(accepted, "FOLDER", tmp_path)
    command.accept({"kernels": _kernel() | {"scan": _kernel()["prepare"]}, "operators": {}}, "")
    good, bad = ({"kernels": _kernel(registers=n), "operators": {}} for n in (100, 200))
    assert command.check(good, "prep") == 0
    assert "prepare: registers 168 -> 100: better\n" in capsys.readouterr().out
    assert command.check(bad, "prep") == 1
    output = capsys.readouterr().out
    assert "prepare: registers 168 -> 200: worse\n" in output
    assert "1 checked, 1 of 1 refused" in output
    command.accept(bad, "prep")
    assert command.check(bad, "prep") == 0
    command.accept({"kernels": {}, "operators": {}}, "prep")
    assert set(accepted.load(ARCH, triton.__version__)["kernels"]) == {"scan"}


def test_every_accepted_figure_has_a_direction(figures):
    for section in figures.values():
        for x in section.values():
            assert {*x, *x.get("opcodes", {})} - {"opcodes"} <= set(DIRECTIONS)


MATRICES = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "n": "i32"}


def test_loops_and_the_shapes_of_products_are_read_from_machine_code():
    facts = compile_kernel(product, MATRICES, {"K": 4096}, arch=ARCH)
    name, part = main_part(facts)
    # [64, 64] x [64, 64] is four steps of 16 for one warp group.
    assert (name, part["HGMMA.64x64x16"], part["HGMMA"]) == ("loops", 4, 4)
    inside = sum(count(loop.opcodes) for loop in facts.nest)
    assert count(facts.straight) + inside == facts.instructions
    assert {loop.depth for loop in facts.nest} == {0}


@pytest.mark.parametrize(("num_warps", "limit"), [(1, "blocks"), (16, "threads")])
def test_a_tiny_kernel_is_limited_by_blocks_or_threads(num_warps, limit):
    pointers = {"x": "*fp32", "y": "*fp32", "n": "i32"}
    size = {"BLOCK": 32 * num_warps}
    facts = compile_kernel(scale, pointers, size, arch=ARCH, num_warps=num_warps)
    assert facts.limit == limit


def test_many_stages_leave_no_shared_memory_for_more_programs():
    facts = compile_kernel(product, MATRICES, {"K": 4096}, arch=ARCH, num_stages=6)
    assert facts.limit == "shared memory"
    assert (facts.occupancy + 1) * facts.shared > find_arch(ARCH).shared


def _prefill(N, T, by):
    """The launches of a prefill, without those of torch."""
    call = call_of_row(Row("prefill", N, T))
    return record(lambda: by(call), ARCH)


# What a program does once, above all for its descriptors, takes as long as two chunks.
@pytest.mark.parametrize("by", [plainly, lambda call: call()], ids=["plain", "hopper"])
def test_the_model_takes_as_much_longer_as_there_are_more_chunks_or_rounds(by):
    *_, short = _prefill(1, 2048, by)
    *_, long = _prefill(1, 8192, by)
    ratio = (model.predict(long).seconds - model.START) / (
        model.predict(short).seconds - model.START
    )
    assert 3.8 < ratio < 4.0 + 1e-9
    many = dataclasses.replace(short, programs=132 * short.compile(ARCH).occupancy)
    more = dataclasses.replace(many, programs=many.programs + 1)
    assert model.predict(many).seconds < model.predict(more).seconds


def test_the_model_is_never_faster_than_memory():
    call = record_all(call_of_row(Row("decode", 1024, 1)), ARCH)
    (launch,) = call
    assert model.predict(launch).bound == "HBM"
    assert model.predict(launch).seconds >= traffic.bytes_moved(launch) / model.BANDWIDTH
    copy = TorchLaunch("copy_", (new(1000),))
    assert model.predict(copy).seconds == model.START + 2000 / model.BANDWIDTH


@pytest.mark.skipif(not has_gluon(), reason="other kernels run one after the other")
def test_kernels_beside_each_other_take_as_long_as_the_longer_one_where_they_have_room():
    launches = record(call_of_row(Row("train", 1, 8192)), ARCH)
    walks = [x for x in launches if x.kernel in ("replay_hopper", "reverse_hopper")]
    seconds = [model.predict(x).seconds for x in walks]
    assert model.duration(walks) == pytest.approx(max(seconds))
    many = [dataclasses.replace(x, programs=132) for x in walks]
    assert model.duration(many) == pytest.approx(sum(model.predict(x).seconds for x in many))


def test_a_program_takes_a_chain_alone_and_its_busiest_pipe_in_company():
    cost = model.Cost({"issue": 100.0, "tensor": 250.0}, 900.0)
    assert [cost.of(programs) for programs in (1, 2, 3, 4, 8)] == [900, 900, 900, 1000, 2000]
    assert cost.busiest == "tensor"


def test_of_a_pool_only_the_named_slots_are_moved():
    def decode(slots):
        q, v = new(4, 1, 16, 128), new(4, 1, 32, 128)
        gates = new(4, 1, 32, dtype=torch.float32), new(4, 1, 32)
        recurrent.recurrent_(q, q, v, *gates, states(slots), integers(4))

    least = bytes_moved(Row("decode", 4, 1))
    for slots in (4, 100):
        (launch,) = record(lambda slots=slots: decode(slots), ARCH)
        assert least * 0.99 < traffic.bytes_moved(launch) < least * 1.01
