"""Tables and pictures say what was measured, of which commit, and which number is whose."""

import json

import pytest

from benchmarks import merge, plot, report, table
from benchmarks.rows import MODELS, ROWS


def run(date="2026-11-24T10:00", rows=("decode 1x1 fp32",), us=2.0, **facts):
    """The numbers of a run on a GPU that there is not."""
    machine = {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "peers": {"FLA": "1"}}
    return {
        "machine": machine | facts,
        "ceilings": {"copy TB/s": 4.0, "mm TFLOP/s": 700.0},
        "date": date,
        "commit": facts.get("commit", "abc"),
        "command": "python -m benchmarks gpu",
        "rows": [
            {
                "row": row,
                "us": us,
                "with_gates": {"us": 1.5 * us},
                "peers": {"FLA": {"us": 2 * us}, "HF": {"reason": "absent"}},
            }
            for row in rows
        ],
    }


def test_our_eager_layer_is_no_peer(tmp_path, monkeypatch):
    compiled = {"us": 90.0, "gpu_us": 40.0, "bytes": 80e6, "flops": 8e7}
    found = {"gdn_ops": compiled, "gdn_ops eager": {"us": 60.0, "gpu_us": 50.0}}
    found |= {"HF": {"us": 300.0, "gpu_us": 250.0}, "HF compiled": {"reason": "not served"}}
    content = run()
    result = report.row_result("layer 1x1 fp32", found, content["ceilings"], {})
    assert result["floor_us"] == 20.0
    assert report.best_peer(result) == ("HF", 300.0)
    assert "eager 60.0; HF 300; HF compiled not served; 3.33 times as fast" in report.line(result)
    content["rows"].append(result)
    (tmp_path / "a.json").write_text(json.dumps(content))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "ROOT", tmp_path)
    line = "| layer 1x1 | 90.0 (40.0) | 60.0 (50.0) | 20.0 | 300 (250) | - | abc |"
    assert line in table.gpu_models().splitlines()


def test_of_a_row_that_was_measured_twice_the_later_is_kept():
    early, late = (
        run(us=2.0, rows=("prefill 512x1 fp32", "decode 1x1 fp32")),
        run("2026-11-25", us=3),
    )
    for files in ({"a": early, "b": late}, {"b": late, "a": early}):
        content = merge.merged(files)
        times = {result["row"]: result["us"] for result in content["rows"]}
        assert list(times.items()) == [("decode 1x1 fp32", 3.0), ("prefill 512x1 fp32", 2.0)]
        assert [r["date"] for r in content["runs"]] == ["2026-11-24T10:00", "2026-11-25"]


def test_a_table_has_the_latest_of_each_row_and_its_commit():
    """On one kind of GPU. Where time was short for a peer, it is that beside an earlier commit."""
    early = run(rows=("prefill 512x1 fp32", "decode 1x1 fp32"))
    early["rows"][1]["peers"] = {"vLLM": {"us": 5.0, "errors": {}}, "HF": {"us": 9.0}}
    late = run("2026-11-25", us=3.0, commit="def")
    late["rows"][0]["peers"] = {"vLLM": {"reason": "not measured: time limit"}}
    other = run("2026-11-23", us=1.0, gpu="NVIDIA H200")
    content = merge.across_commits([early, late, other])
    step, prefill = content["rows"]
    assert (step["us"], step["commit"]) == (3.0, "def")
    assert step["peers"] == {"vLLM": {"us": 5.0, "errors": {}, "beside": "abc"}}
    assert (prefill["us"], prefill["commit"]) == (early["rows"][0]["us"], "abc")
    text = table.gpu_table({"decode 1x1 fp32": "decode"}, content)
    assert "| 3.00 |" in text
    assert "| 5.00* | def |" in text


def test_a_row_without_a_number_replaces_none_that_has_one():
    late = run("2026-11-25")
    late["rows"] = [{"row": "decode 1x1 fp32", "reason": "not measured: time limit"}]
    assert merge.merged({"a": run(), "b": late})["rows"] == run()["rows"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"gpu": "NVIDIA H100"}, "b must have the gpu of a, NVIDIA H200, got NVIDIA H100"),
        ({"torch": "2.12.0"}, "b must have the torch of a, 2.11.0, got 2.12.0"),
        ({"commit": "def"}, "b must have the commit of a, abc, got def"),
    ],
)
def test_runs_that_differ_are_not_merged(other, message):
    with pytest.raises(ValueError, match=message):
        merge.merged({"a": run(), "b": run("2026-11-25", **other)})


def test_merged_numbers_are_a_file_for_the_tables(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(run()))
    (tmp_path / "b.json").write_text(json.dumps(run("2026-11-25", rows=("decode 1x16 fp32",))))
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    merge.main([*files, "-o", str(tmp_path / "c.json")])
    content = json.loads((tmp_path / "c.json").read_text())
    content = merge.across_commits([content])
    assert "decode 1x16 fp32" in table.gpu_table({str(row): str(row) for row in ROWS}, content)


def test_rows_that_a_run_lacks_are_named_by_size_or_all_together():
    absent = {str(row) for row in ROWS if row.name in ("verify_once", "layout_scan")}
    names = table.row_names(absent | {"decode 1x1 fp32", "decode 1x16 bf16"})
    assert names == "decode 1x1 fp32, decode 1x16 bf16, verify_once, layout_scan"


def test_pictures_of_a_run_are_drawn_beside_its_file_and_the_same_again(tmp_path):
    content = run(rows=[str(row) for row in ROWS if row.name not in MODELS])
    layer = {"row": "layer 1x1 fp32", "us": 90.0, "gpu_us": 40.0, "bytes": 80e6, "flops": 8e7}
    content["rows"] += [layer | {"peers": {"HF": {"us": 300.0}}}, {"row": "model 1x1 fp32"}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    plot.main([str(tmp_path / "a.json")])
    names = {"a-roofline.png", "a-roofline.svg", "a-peers.png", "a-peers.svg"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"a.json"}
    drawn = {name: (tmp_path / name).read_bytes() for name in names}
    plot.main([str(tmp_path / "a.json")])
    assert drawn == {name: (tmp_path / name).read_bytes() for name in names}


def test_points_of_a_roofline_lie_where_bytes_and_times_say():
    # 32 heads of 6 * 128 * 128 operations, 24832 bytes of tokens and two states of 2 MiB.
    flops = 32 * 6 * 128 * 128
    assert plot.point(run()["rows"][0]) == pytest.approx(
        (flops / (24832 + 2 * 2097152), flops / 2e-6 / 1e12)
    )
    assert plot.ratios(run()["rows"][0]) == {"FLA": 2 / 1.5}
    assert plot.point({"row": "decode 1x1 fp32", "reason": "absent"}) is None


def test_the_tables_of_the_pages_are_the_newest_numbers():
    assert table.newest("gpu") is not None
    assert table.stale() == []


def test_a_page_with_another_number_is_out_of_date():
    text = (table.ROOT / "README.md").read_text()
    _, content = table.newest("gpu")
    us = report.number(table.by_row(content)["decode 1x64 fp32"]["us"])
    wrong = text.replace(f"| {us} |", "| 1.0 |")
    assert wrong != text
    assert table.rewritten("README.md", wrong) == text


def test_a_number_on_a_cpu_that_is_changed_is_out_of_date():
    text = (table.ROOT / "README.md").read_text()
    _, content = table.newest("cpu")
    us = table.cpu_cells(content["rows"][0])[2]
    wrong = text.replace(f"| {us} |", "| 1.0 (0.1) |")
    assert wrong != text
    assert table.rewritten("README.md", wrong) == text
