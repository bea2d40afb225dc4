"""The benchmark suite measures what it says, and names what it does not measure."""

import json
import sys
import time

import pytest
import torch

from benchmarks import exact, models, operators, ours, pack, report, suite, unpack
from benchmarks.cases import make_case
from benchmarks.entry import (
    ROUNDS,
    Entry,
    Side,
    Wrong,
    checked,
    measured,
    measured_in_turn,
    refuse,
)
from benchmarks.peers import PEERS
from benchmarks.rows import HEADLINE, ROWS, Heads, Row, bytes_moved, chosen, parse
from gdn_ops.integrations.transformers import REPLACEMENTS

HEADS = Heads(2, 4, 16, 8)


def test_rows_are_unique_and_read_back():
    assert len({str(row) for row in ROWS}) == len(ROWS)
    assert [parse(str(row)) for row in ROWS] == list(ROWS)


def test_headlines_are_rows_that_come_first_and_no_row_is_lost():
    assert set(HEADLINE) <= set(ROWS)
    assert tuple(chosen(None)[: len(HEADLINE)]) == HEADLINE
    assert sorted(map(str, chosen(None))) == sorted(map(str, ROWS))
    assert list(map(str, chosen(["prefill 8192x1 fp32 tp8"]))) == ["prefill 8192x1 fp32 tp8"]


def test_rows_of_operators_alone_have_targets_and_no_others():
    targets = json.loads(suite.TARGETS.read_text())["rows"]
    named = {"decode", "verify", "verify_once", "prefill", "train"}
    assert {str(row) for row in ROWS if row.name in named} == set(targets)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # A token of 16 and 32 heads: q and k of 2048 numbers, v and o of 4096, two bytes each, and
        # 32 gates and 32 betas of four: 24832 bytes. A float32 state: 32 * 128 * 128 * 4 = 2 MiB.
        ("decode 1x1 fp32", 24832 + 2 * 2097152),
        ("decode 1x64 bf16", 64 * (24832 + 2 * 1048576)),
        ("verify 4x64 fp32", 64 * (4 * 24832 + 5 * 2097152)),
        ("verify_once 4x64 fp32", 64 * (4 * 24832 + 2 * 2097152)),
        ("prefill 8192x4 fp32", 4 * (8192 * 24832 + 2097152)),
        ("prefill_serving 512x1 fp32", 512 * 24832 + 2 * 2097152),
        ("train 8192x1 fp32", 3 * 8192 * 24832),
        ("prefill 8192x1 fp32 tp8", (8192 * 24832 + 2097152) // 8),
    ],
)
def test_the_least_traffic_is_that_of_tokens_and_states(row, expected):
    assert bytes_moved(parse(row)) == expected


@pytest.mark.parametrize("name", ["gdn_ops", "hugging_face"])
@pytest.mark.parametrize("row", [Row("prefill", 2, 70), Row("decode", 3, 1, "bf16")], ids=str)
def test_contenders_agree_with_the_loop_over_tokens(name, row):
    errors = operators.check(name, row, HEADS, "cpu")
    assert set(errors) >= {"o"}


@pytest.mark.parametrize(
    "row", [Row("verify", 3, 4), Row("verify_once", 3, 4), Row("train", 2, 40)], ids=str
)
def test_our_steps_and_gradients_agree_with_the_loop_over_tokens(row):
    operators.check("gdn_ops", row, HEADS, "cpu")


@pytest.mark.parametrize("row", [Row("decode", 3, 1), Row("prefill_serving", 2, 70)], ids=str)
def test_our_compiled_call_with_gates_agrees_with_the_loop_over_tokens(row):
    name = ours.WITH_GATES if row.name == "decode" else "gdn_ops"
    operators.check(name, row, HEADS, "cpu")


# Sizes of a layer and of a model that a CPU has time for.
TINY = {
    "hidden_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
TINY_MODEL = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY_MODEL |= {"intermediate_size": 64, **TINY}


@pytest.mark.parametrize(
    ("row", "sizes"),
    [
        (Row("layer", 3, 1), TINY),
        (Row("layer", 1, 150), TINY),
        (Row("model", 3, 1), TINY_MODEL),
    ],
    ids=["layer decode", "layer prefill", "model decode"],
)
def test_layers_and_models_agree_with_those_of_transformers(row, sizes):
    comparison = models.Comparison(row, sizes, "cpu")
    for side in models.sides_of(("hugging_face",)):
        errors = comparison.check(side)
        assert set(errors) == {"o", "state"}
        # Of bfloat16 weights against the same in float32: nothing is compared with itself.
        assert errors["o"] > torch.finfo(torch.bfloat16).eps / 8


def test_a_layer_with_a_wrong_operator_is_not_timed(monkeypatch):
    name = "torch_recurrent_gated_delta_rule"
    right = REPLACEMENTS[name]
    monkeypatch.setitem(
        REPLACEMENTS, name, lambda q, k, v, **options: right(q, k, 1.1 * v, **options)
    )
    sides = {side.name: side for side in models.sides(Row("layer", 2, 1), (), TINY, "cpu")}
    assert checked(sides["gdn_ops eager"])["reason"].startswith("wrong: o is off by")


def test_the_floor_of_a_layer_is_its_weights_and_states_or_its_products():
    comparison = models.Comparison(Row("layer", 3, 1), TINY, "cpu")
    comparison.check("gdn_ops eager")
    # q, k, v and z of 64 rows and 32 + 32 + 128 + 128 columns, a and b of 4 each, the way back.
    matrices = 64 * 320 + 64 * 8 + 128 * 64
    others = 4 * 192 + 4 + 4 + 32  # taps, A_log, dt_bias, the weight of the norm
    state = 3 * 4 * 16 * 32 * 4
    assert comparison.least() == {
        "bytes": 2 * (matrices + others) + 2 * 2 * 3 * 64 + 2 * state,
        "flops": 2 * matrices * 3,
    }
    ceilings = {"copy TB/s": 4.0, "mm TFLOP/s": 500.0}
    assert report.floor("layer 1x1 fp32", {"bytes": 8e6, "flops": 1e6}, ceilings) == 2.0
    assert report.floor("layer 1x1 fp32", {"bytes": 8e6, "flops": 5e9}, ceilings) == 10.0


def test_a_write_to_a_slot_of_no_sequence_is_wrong():
    row = Row("decode", 2, 1)
    case = make_case(row, HEADS, "cpu")
    expected = exact.answer(row, case, gates=False)

    def call():
        o = operators.make_call("gdn_ops", row, case)()
        case.pool[0] += 1
        return o

    errors = exact.errors(exact.results(row, case, call), expected)
    with pytest.raises(Wrong, match="elsewhere is off by"):
        refuse(errors, exact.bound)


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_wrong_result_is_not_timed(error):
    def check():
        refuse({"o": error}, exact.bound)
        return {}

    def calls():
        raise AssertionError("timed")

    result = measured(Entry("peer", check, calls))
    assert result["reason"].startswith("wrong: o is off by")


def test_calls_from_python_take_turns_and_one_that_fails_does_not_end_the_others():
    order = []

    def side(name, *times):
        def sample():
            order.append(name)
            if not times:
                raise RuntimeError("lost")
            return list(times), [time / 2 for time in times]

        return Side(name, dict, sample, lambda: {"bytes": 8})

    found = measured_in_turn([side("ours", 1.0, 2.0, 3.0), side("peer"), side("other", 5.0)])
    # Each round in the opposite order of the one before, and a side that failed no more.
    assert order[:5] == ["other", "peer", "ours", "ours", "other"]
    assert order.count("ours") == order.count("other") == ROUNDS
    assert found["ours"] == {"us": 2.0, "p10": 1.0, "p90": 3.0, "gpu_us": 1.0, "bytes": 8}
    assert found["peer"] == {"reason": "RuntimeError: lost"}
    assert found["other"]["us"] == 5.0


def test_an_absent_peer_is_named_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    row = Row("prefill", 1, 512)
    entry = next(e for e in operators.entries(row, PEERS, HEADS, "cpu") if e.name == "FlashInfer")
    found = {"gdn_ops": {"us": 1.0}, "FlashInfer": measured(entry)}
    line = report.line(report.row_result(str(row), found, {"copy TB/s": 4.0}, {}))
    assert "FlashInfer not installed: " in line


# Stands for a worker: in each row one peer ends the process, and one says nothing for ever.
DYING = """
import json, sys, time
job = json.load(sys.stdin)
say = lambda **event: print(json.dumps(event), flush=True)
if job["first"]:
    say(machine={"gpu": "none"}); say(ceilings={"copy TB/s": 4.0})
for row in job["rows"]:
    for name in ("gdn_ops", "dying", "silent"):
        if name in job["done"].get(row, []):
            continue
        say(row=row, name=name, started=0)
        if name == "dying":
            sys.exit("an illegal memory access")
        if name == "silent":
            time.sleep(600)
        say(row=row, name=name, result={"us": 2.0})
    say(finished=row)
"""


def test_a_peer_that_ends_the_process_or_hangs_is_named_and_the_run_goes_on(monkeypatch):
    monkeypatch.setattr(suite, "STALL_SECONDS", 4)
    rows = [Row("prefill", 1, 512), Row("prefill", 1, 2048)]
    run = suite.Run(rows, (), time.time() + 60, (sys.executable, "-c", DYING))
    assert list(run.measure()) == [str(row) for row in rows]
    for result in run.results():
        assert result["us"] == 2.0
        assert result["peers"] == {
            "dying": {"reason": "an illegal memory access"},
            "silent": {"reason": "silent for 4 s"},
        }


def test_the_command_of_a_run_is_kept_without_paths():
    args = suite.arguments(["--rows", "decode,verify", "--peers", "fla", "--json", "/x/y.json"])
    kept = "python -m benchmarks gpu --rows decode,verify --peers fla --time-limit 3600"
    assert suite.command(args) == kept
    again = suite.arguments(kept.split()[4:])
    assert (again.rows, again.peers, again.time_limit) == (args.rows, args.peers, args.time_limit)


def test_the_process_that_measures_says_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="needs a GPU, and torch finds none"):
        suite.main(["--rows", "decode"])


def test_each_package_travels_once_and_only_for_known_peers():
    packages = pack.plan(list(pack.PACKAGES))
    assert len({package.requirement for package in packages}) == len(packages)
    assert {"fla-core", "flashinfer-python", "attn-gym", "flash-qla", "vllm", "transformers"} <= {
        package.name for package in packages
    }
    with pytest.raises(ValueError, match="peers: torch must be one of fla, "):
        pack.plan(["torch"])


def test_only_kernels_of_vllm_travel():
    (vllm,) = pack.plan(["vllm"])
    assert pack.left_out(vllm, f"{pack.VLLM_OPS}chunk.py") is None
    assert pack.left_out(vllm, "vllm/_C.abi3.so") == "not a file of its Triton kernels"


def test_volumes_stay_below_the_limit():
    sizes = [30, 25, 20, 60, 25]
    numbers = pack.volumes(sizes, 50)
    assert numbers == [1, 2, 1, 0, 2]


def test_what_is_packed_is_what_is_unpacked(tmp_path):
    files = [("peer/__init__.py", b"x = 1\n"), ("peer/lib.so", bytes(range(256)) * 999)]
    (tmp_path / "1").mkdir()
    pack.write_archive(tmp_path / "1" / "peer.tar.xz", files)
    unpack.main([str(tmp_path / "1"), str(tmp_path / "target")])
    for name, content in files:
        assert (tmp_path / "target" / name).read_bytes() == content
