"""``python -m lowering.inspect`` shows what a model's kernels are on a GPU that is not there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowering import fake_gpu
from lowering.inspect import inspect, main

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

SCRIPT = """
import torch
import gdn_ops

def layer(x, w):
    return torch.softmax(x @ w, -1).bfloat16()

def factory():
    return layer, (torch.empty(64, 128, device="meta"), torch.empty(128, 512, device="meta"))

def decode(batch=1):
    tokens = (torch.randn(batch, 1, 2, 16) for _ in range(3))
    return gdn_ops.recurrent_, (*tokens, None, None, torch.zeros(9, 2, 16, 16))

def training():
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()), (torch.randn(4, 8),)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspected") / "script.py"
    path.write_text(SCRIPT)
    return path


def _cli(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lowering.inspect", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _factory():
    return lambda x, w: torch.softmax(x @ w, -1), (torch.randn(64, 128), torch.randn(128, 512))


def test_a_report_has_kernels_and_calls_and_bytes():
    (graph,) = inspect(_factory)
    (kernel,) = graph.kernels
    assert graph.calls == {"extern_kernels.mm": 1}
    assert kernel.kind == "persistent_reduction"
    assert "aten._softmax" in kernel.fused
    # Softmax in place, or into a tensor of its own: the same bytes.
    assert kernel.bytes >= 2 * 64 * 512 * 4
    assert kernel.registers > 0
    assert kernel.spills == 0
    assert kernel.occupancy > 0


def test_a_dtype_converts_the_model():
    (graph,) = inspect(_factory, dtype=torch.bfloat16)
    (kernel,) = graph.kernels
    assert kernel.bytes == 2 * 64 * 512 * 2


def test_the_report_is_text_where_it_does_not_go_to_a_terminal(script):
    run = _cli(f"{script}:factory", "--code")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("sm_90 (NVIDIA H200), 1 graph\n")
    assert "call extern_kernels.mm" in run.stdout
    assert "registers: " in run.stdout
    assert "def call(" in run.stdout
    assert run.stdout.isascii()


def test_the_report_is_json_on_request_and_in_the_interpreter_s_environment(script):
    run = _cli(
        *(f"{script}:training", "--json", "--arch", "gfx942", "--mode", "reduce-overhead"),
        TRITON_INTERPRET="1",
    )
    assert run.returncode == 0, run.stderr
    graphs = json.loads(run.stdout)
    assert [graph["phase"] for graph in graphs] == ["forward", "backward"]
    assert all(kernel["registers"] for graph in graphs for kernel in graph["kernels"])
    assert "code" not in graphs[0]


def test_a_template_is_called_by_its_operator_and_stage_at_the_sizes_that_were_asked_for(script):
    run = _cli(f"{script}:decode", "--json", "batch=7")
    assert run.returncode == 0, run.stderr
    (kernel,) = json.loads(run.stdout)[0]["kernels"]
    assert (kernel["kind"], kernel["template"]) == ("template", "gdn_recurrent")
    # q, k, v and o once, the pool read and written.
    assert kernel["bytes"] == 4 * 2 * 16 * (4 * 7 + 2 * 9 * 16)


def test_a_terminal_shows_a_table(script, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert main([f"{script}:decode"]) == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert lines[0] == "sm_90 (NVIDIA H200), 1 graph"
    columns = next(line for line in lines if "registers" in line)
    assert re.findall(r"\w+", columns)[:4] == ["kernel", "kind", "launches", "fused"]
    assert any("template gdn_recurrent" in line for line in lines)


def _refusal(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_inspected_is_refused_in_one_sentence(script, capsys):
    for arguments, message in (
        ([f"{script}:missing"], "must define the function missing, got None"),
        (["nothing.py:factory"], "TARGET must name a script that exists, got 'nothing.py'"),
        (["no.such.module:factory"], "TARGET must name a module, got 'no.such.module'"),
        (["a module"], "TARGET must be path/to/script.py, path/to/script.py:factory or "),
        ([script], "must call torch.compile, and what that returns"),
        ([f"{script}:factory", "--arch", "sm_70"], "arch must be one of sm_80, "),
        ([f"{script}:decode", "tokens=2"], "NAME=VALUE must be an argument of the factory, (batch"),
        ([f"{script}:decode", "batch=two"], "got 'batch=two'"),
    ):
        assert message in _refusal(capsys, *arguments)


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this build of torch has a CUDA guard")
def test_a_missing_compiler_is_told_in_one_sentence(script, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(fake_gpu, "_guard_library", fake_gpu._guard_library.__wrapped__)
    message = _refusal(capsys, f"{script}:factory")
    assert "a CPU build of torch needs a C++ compiler once, got none" in message
