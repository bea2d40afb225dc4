"""The examples do what they say: the small model trains, its checkpoint predicts and generates."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = '{"hidden_size": 32, "num_hidden_layers": 2, "full_attention_interval": 2}'


@pytest.fixture(scope="module", autouse=True)
def examples_on_the_path():
    """The examples import each other as scripts do: by name, from their own folder."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def module(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model, trained for three steps in one process."""
    out = tmp_path_factory.mktemp("model")
    options = f"--steps 3 --batch 2 --length 70 --windows 2 --processes 1 --out {out}".split()
    module("train").main([*options, "--config", TINY])
    return out


def test_training_leaves_a_checkpoint_and_a_plot(trained):
    assert (trained / "model.safetensors").stat().st_size > 0
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_training_goes_through_the_operators_and_moves_every_parameter(trained):
    train = module("train")
    model = train.new_model(train.small_config())
    seen = set()

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(str(function))
            return function(*args, **(kwargs or {}))

    with train.use_gdn_ops(model), Recorder():
        _, loss = train.loss_of(model, torch.randint(0, 256, (1, 71)))
        loss.backward()
    names = ("chunk", "chunk_backward", "causal_conv1d", "causal_conv1d_backward")
    assert {f"gdn.{name}.default" for name in names} <= seen
    still = [name for name, p in model.named_parameters() if p.grad is None]
    assert not still


def test_held_out_files_are_in_no_training_text():
    corpus = module("byte_corpus")
    held_out = [path for name, path in corpus.source_files() if corpus.is_held_out(name)]
    prompt_file = module("generate").PROMPT_FILE
    assert prompt_file.resolve() in {path.resolve() for path in held_out}
    train, _ = corpus.load_corpus()
    assert prompt_file.read_bytes() not in bytes(train.tolist())


def test_text_survives_the_way_to_tokens_and_back():
    corpus = module("byte_corpus")
    text = "déjà vu = 'λ'\n"
    assert corpus.decode(corpus.encode(text)[1:]) == text


def test_the_checkpoint_predicts_unseen_source_in_half_the_bits_of_byte_frequencies():
    generate, train, corpus = module("generate"), module("train"), module("byte_corpus")
    _, held_out = corpus.load_corpus()
    frequency = torch.bincount(held_out.long(), minlength=256) / len(held_out)
    entropy = -torch.special.xlogy(frequency, frequency).sum().item()
    model = generate.load_model(generate.parse([]))
    with generate.use_gdn_ops(model):
        loss = train.held_out_loss(model, corpus.even_windows(held_out, 8, 256))
    assert loss < entropy / 2


def test_the_checkpoint_is_small_enough_for_a_repository():
    assert (EXAMPLES / "model" / "model.safetensors").stat().st_size <= 4_000_000


def test_the_checkpoint_generates_the_tokens_of_hugging_faces_own_functions():
    generate = module("generate")
    arguments = generate.parse([])
    model = generate.load_model(arguments)
    prompt = generate.language_of(arguments.model).encode(arguments.prompt)[None, :512]
    noise = generate.draw_noise(arguments, model)
    ours = generate.Variant("ours", model, generate.use_gdn_ops, compiled=False)
    own = generate.Variant("own", model, generate.hugging_face_functions, compiled=False)
    expected = own.generate(prompt, noise)
    assert len(expected.unique()) > 20  # a model that repeats one word would prove nothing
    assert torch.equal(ours.generate(prompt, noise), expected)


def test_the_main_job_prints_one_graph_and_identical_tokens(trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = ["--prompt-tokens", "70", "--tokens", "8", "--repeats", "1"]
    module("generate").main(["--model", str(trained), *options])
    rows = {}
    printed = capsys.readouterr().out
    (opaque,) = (line for line in printed.splitlines() if "opaque calls on cpu" in line)
    assert "gdn.chunk" in opaque
    for line in printed.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("│").split("│"))
        rows[name] = cells
    for name, graphs in {
        "gdn_ops compiled": ["0", "1"],
        "gdn_ops eager": ["", ""],
        "Hugging Face eager": ["", ""],
        "Hugging Face compiled": ["0", "5"],
    }.items():
        *counts, same, prefill, decode = rows[name]
        assert (counts, same) == (graphs, "yes")
        assert float(prefill) > 0
        assert float(decode) > 0


def test_speculative_decoding_prints_identical_texts_and_leaves_a_plot(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    plot = tmp_path / "steps.png"
    sizes = ["--rows=2", "--prompt-tokens=40", "--tokens=24", "--drafted=3", "--repeats=1"]
    module("speculative").main(["--model", str(trained), *sizes, "--eager", "--plot", str(plot)])
    printed = capsys.readouterr().out
    assert "texts of 46 tokens identical: yes" in printed
    rows = {}
    for line in printed.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("│").split("│"))
        rows[name] = cells
    assert rows["plain"][:2] == ["", "1.00"]
    kept, each, *rates = rows["3 drafted tokens"]
    assert 0 <= int(kept.rstrip("%")) <= 100
    assert 1 <= float(each) <= 4
    assert all(float(rate) > 0 for rate in rates)
    assert plot.read_bytes().startswith(b"\x89PNG")
