"""Packages of examples/export.py: any batch and length, states in place, and what loads them."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tokens

# torch 2.13 warns of its own use of LeafSpec when a program is copied.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")

EXAMPLES = Path(__file__).parent.parent / "examples"
CONTEXT, COUNT = 96, 8


@pytest.fixture(scope="module", autouse=True)
def examples_on_the_path():
    """The examples import each other as scripts do: by name, from their own folder."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def new_model(**sizes):
    """Random weights, so large that each token depends on the text before it."""
    train = importlib.import_module("train")
    torch.manual_seed(0)
    config = train.small_config(hidden_size=32, initializer_range=0.3, **sizes)
    return train.new_model(config).eval()


@pytest.fixture(scope="module")
def model():
    return new_model(num_hidden_layers=2, full_attention_interval=2)


@pytest.fixture(scope="module")
def packages(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    # Compiled in half the time; the code is the same.
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    importlib.import_module("export").package(model, folder, CONTEXT, options)
    return folder


@pytest.mark.parametrize(("rows", "length"), [(1, 70), (3, 5), (2, 3)])
def test_packages_generate_the_tokens_of_the_eager_model(model, packages, rows, length):
    export, runner = (importlib.import_module(name) for name in ("export", "run_exported"))
    prompt = tokens(rows, length)
    expected = export.eager_tokens(model, prompt, COUNT, CONTEXT)
    assert len(expected.unique()) > rows  # a model that repeats one word would prove nothing
    assert torch.equal(runner.generate(packages, prompt, COUNT), expected)


def test_a_fresh_process_without_transformers_generates_the_same_tokens(model, packages):
    export = importlib.import_module("export")
    prompt = tokens(2, 20)
    expected = export.eager_tokens(model, prompt, COUNT, CONTEXT)
    assert torch.equal(export.run_in_fresh_process(packages, prompt, COUNT), expected)


def test_decode_loads_with_torch_alone_and_prefill_asks_for_the_operators(packages):
    program = f"""
import sys, torch
load = torch._inductor.aoti_load_package
load({str(packages / "decode.pt2")!r})
try:
    load({str(packages / "prefill.pt2")!r})
except RuntimeError as error:
    assert "Could not find schema for gdn::" in str(error), error
else:
    raise AssertionError("prefill needs no operators")
assert "gdn_ops" not in sys.modules
import gdn_ops
load({str(packages / "prefill.pt2")!r})
assert "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_prompt_that_does_not_fit_is_refused(packages):
    runner = importlib.import_module("run_exported")
    with pytest.raises(ValueError, match="must fit the context of 96, got 90 \\+ 8"):
        runner.generate(packages, tokens(1, 90), COUNT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_kernels_of_a_gpu_are_written_as_it_would_load_them(tmp_path):
    export = importlib.import_module("export")
    model = new_model(num_hidden_layers=2, full_attention_interval=2, num_experts=0)
    files = export.compile_for_gpu(model, tmp_path, CONTEXT, "sm_90", ["decode"])
    assert sum("recurrent" in name for name, _ in files) == 1
    for name, count in files:
        binary = (tmp_path / name).read_bytes()
        assert binary.startswith(b"\x7fELF")
        assert len(binary) == count
    code = (tmp_path / "sm_90" / "decode" / "module.py").read_text()
    assert all(f"{Path(name).stem}.run(" in code for name, _ in files)
