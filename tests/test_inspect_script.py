"""``python -m lowering.inspect script.py`` shows what a script compiles, which runs as ever."""

import json

import pytest
import torch

from lowering.inspect import inspect_script, main
from lowering.inspect_script import captured_graphs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

STEP = """
import sys
import torch
import gdn_ops

@torch.compile(mode="reduce-overhead")
def step(q, k, v, a, b, rate, pool):
    places = torch.arange(len(q), device=q.device) + torch.zeros(len(q), dtype=torch.long)
    g = gdn_ops.gdn_gate(a, rate, rate)
    return gdn_ops.recurrent_(q, k, v, g, b.sigmoid(), pool, places.int()) * 2

B = int(sys.argv[1])
q, k, v = torch.randn(3, B, 1, 2, 64, dtype=torch.bfloat16)
a, b = torch.randn(2, B, 1, 2, dtype=torch.bfloat16)
pool = torch.zeros(8, 2, 64, 64)
with torch.no_grad():
    o = step(q, k, v, a, b, torch.rand(2), pool)
assert o.shape == v.shape and pool[B - 1].any() and not pool[B:].any()
print("the script's own words")
"""
TRAINING = """
import torch

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
torch.compile(model)(torch.randn(4, 8)).sum().backward()
assert model[0].weight.grad is not None
"""


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "user_script.py"
        path.write_text(text)
        return path

    return write


def test_a_script_runs_and_shows_what_it_compiled(script, capsys):
    """Its results are right, its own words are not in the report, and it gets its arguments."""
    assert main([str(script(STEP)), "3", "--json"]) == 0
    printed = capsys.readouterr()
    (graph,) = json.loads(printed.out)
    templates = [kernel["template"] for kernel in graph["kernels"] if kernel["template"]]
    assert templates == ["gdn_recurrent"]
    assert graph["phase"] == "inference"
    assert "the script's own words" in printed.err


def test_each_graph_of_a_script_is_shown_and_a_backward_too(script):
    path = script(TRAINING)
    assert [graph.phase for graph in inspect_script(path)] == ["forward", "backward"]
    (found,) = captured_graphs(path)
    assert found.is_grad_enabled
    assert all(x.is_meta for x in found.inputs)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import torch\n", "must call torch.compile, and what that returns"),
        ("import sys\nsys.exit(3)\n", "ended with 3"),
    ],
    ids=["nothing", "failure"],
)
def test_a_script_of_which_there_is_nothing_to_see_is_refused_in_one_sentence(
    text, said, script, capsys
):
    path = script(text)
    assert main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"inspect: {path} {said}"


def test_a_script_that_is_not_there_is_refused_in_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "absent.py")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("inspect: TARGET must name a script that exists, got ")
