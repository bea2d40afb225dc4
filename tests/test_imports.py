"""What importing costs and brings in, and which package may know which."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gdn_ops

ROOT = Path(__file__).parents[1]
PUBLIC = [
    "causal_conv1d",
    "causal_conv1d_",
    "chunk",
    "chunk_",
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "gdn_gate",
    "recurrent",
    "recurrent_",
    "rms_norm_gated",
]


def _python(code, **environment):
    """What a fresh interpreter prints, started as anyone would start it."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_brings_in_no_module_but_our_own():
    """Above all neither triton nor ``torch._inductor``."""
    code = "import sys, torch; alone = set(sys.modules); import gdn_ops; "
    added = set(_python(code + "print(*set(sys.modules) - alone)").split())
    assert "gdn_ops.chunk" in added
    # The standard library is no burden; all else is a dependency.
    others = {name.partition(".")[0] for name in added} - sys.stdlib_module_names - {"gdn_ops"}
    torchs = {name for name in added if name.startswith("torch")}
    assert others == set()
    assert torchs == set()


def test_importing_takes_less_than_a_fifth_of_a_second_on_top_of_torch():
    """Once in five, because a machine may be busy with something else."""
    code = "import time, torch; t = time.perf_counter(); import gdn_ops; "
    code += "print(time.perf_counter() - t)"
    assert any(float(_python(code)) < 0.2 for _ in range(5))


def test_logs_may_be_asked_for_in_the_environment():
    """torch then imports us while it is itself being imported; the operators must work after it."""
    code = """
import torch, logging, gdn_ops
x = torch.ones(1, 2, 1, 3)
print(gdn_ops.chunk(x, x, x)[0].shape == x.shape)
print(logging.getLogger("gdn_ops").getEffectiveLevel() == logging.DEBUG)
"""
    assert _python(code, TORCH_LOGS="+gdn_ops").split() == ["True", "True"]


def _imports(path):
    """The modules that a file imports, at its top or in a function, relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _importers(package, module):
    """The files of ``package`` that import ``module`` or a part of it."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / package).rglob("*.py")
        if any(name == module or name.startswith(module + ".") for name in _imports(path))
    }


def test_what_an_operator_means_does_not_know_how_it_is_made_fast():
    assert _importers("gdn_ops", "lowering") == set()
    assert _importers("gdn_ops", "torch._inductor") == set()


def test_one_file_alone_knows_inductor():
    assert _importers("lowering", "torch._inductor") <= {"lowering/_inductor.py"}


def test_the_walk_over_imports_finds_them():
    """Guards the three tests above against a walk that finds nothing."""
    assert "gdn_ops/chunk.py" in _importers("gdn_ops", "torch")
    assert "gdn_ops/chunk.py" in _importers("gdn_ops", "gdn_ops._chunk_math")
    assert "gdn_ops/_checks.py" in _importers("gdn_ops", "torch.fx")


def test_kernels_are_imported_where_they_are_launched():
    """No module imports triton when it is itself imported, but the kernels' own files."""
    for path in (ROOT / "gdn_ops").rglob("*.py"):
        if "kernels" in path.parts:
            continue
        top = ast.parse(path.read_text()).body
        names = [name for node in top if isinstance(node, ast.Import) for name in node.names]
        names = [name.name for name in names]
        names += [node.module for node in top if isinstance(node, ast.ImportFrom) if node.module]
        assert not [name for name in names if name.partition(".")[0] == "triton"], path


def test_these_are_the_public_names():
    names = [name for name, value in vars(gdn_ops).items() if inspect.isfunction(value)]
    assert sorted(name for name in names if not name.startswith("_")) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_function_documents_every_argument(name):
    function = getattr(gdn_ops, name)
    text = inspect.getdoc(function)
    assert all(f"\n{heading}:" in text for heading in ("Args", "Returns", "Raises", "Source"))
    arguments = text.partition("\nArgs:\n")[2].partition("\nReturns:")[0]
    described = [
        line.partition(":")[0].strip().lstrip("*")
        for line in arguments.splitlines()
        if line.startswith("    ") and not line.startswith("     ")
    ]
    assert described == list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    "name", ["chunk", "chunk_", "recurrent", "recurrent_", "causal_conv1d", "causal_conv1d_"]
)
def test_a_public_function_has_the_arguments_and_defaults_of_its_operator(name):
    schema = getattr(torch.ops.gdn, name).default._schema
    parameters = inspect.signature(getattr(gdn_ops, name)).parameters
    assert [x.name for x in schema.arguments] == list(parameters)
    for x, p in zip(schema.arguments, parameters.values(), strict=True):
        assert x.kwarg_only == (p.kind is inspect.Parameter.KEYWORD_ONLY), x.name
        assert x.has_default_value() == (p.default is not inspect.Parameter.empty), x.name
        assert not x.has_default_value() or x.default_value == p.default, x.name


def test_every_file_of_the_packages_stays_readable():
    """A file of more than 400 lines has two ideas in it."""
    for package in ("gdn_ops", "lowering", "tests"):
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) < 400, path
