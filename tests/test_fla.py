"""FLA's functions and ours get the same call and must give the same answer."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fla_peer import answer, signature

from gdn_ops.integrations import fla as ours

CHUNK, RECURRENT = "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"
B, T, H, HV, K, V = 2, 67, 2, 4, 16, 24  # T tokens are two chunks
FEW = 5  # tokens where their number does not matter: FLA's kernels are interpreted
# Rounding units that the two may be apart, relative to the largest value: both accumulate in
# float32 in another order, and round once to the dtype of the result. FLA's chunked kernels round
# the operands of their products too, to the dtype of the inputs, so that is what counts for them.
UNITS = {torch.float32: 64, torch.float16: 2, torch.bfloat16: 2}


def _inputs(rows=B, tokens=FEW, dtype=torch.float32):
    q, k = torch.randn(2, rows, tokens, H, K).div(K**0.5).to(dtype)
    g = -torch.rand(rows, tokens, HV)
    v = torch.randn(rows, tokens, HV, V).to(dtype)
    return {"q": q, "k": k, "v": v, "g": g, "beta": torch.rand(rows, tokens, HV)}


def _state(sequences=B, shape=(K, V)):
    return torch.randn(sequences, HV, *shape)


def _calls_of_both():
    raw = {
        "g": torch.randn(B, FEW, HV),
        "use_gate_in_kernel": True,
        "A_log": torch.rand(HV).log(),
    }
    logits = {"beta": torch.randn(B, FEW, HV), "use_beta_sigmoid_in_kernel": True}
    bounds = torch.tensor([0, 3, 3, FEW])
    packed = {"cu_seqlens": bounds, "initial_state": _state(3)}
    final = {"output_final_state": True}
    return {
        "no-final-state": _inputs(),
        "final-state": _inputs() | final,
        "states-k-first": _inputs() | final | {"initial_state": _state()},
        "states-v-first": _inputs()
        | final
        | {"initial_state": _state(shape=(V, K)), "state_v_first": True},
        "old-name-of-v-first": _inputs()
        | final
        | {"initial_state": _state(shape=(V, K)), "transpose_state_layout": True},
        "scale": _inputs() | {"scale": 0.7},
        "l2norm": _inputs() | {"use_qk_l2norm_in_kernel": True},
        "packed": _inputs(1) | final | packed,
        "gate": _inputs() | raw | {"dt_bias": torch.randn(HV)},
        "gate-without-bias": _inputs() | raw,
        "sigmoid": _inputs() | logits,
        "negative-eigenvalues": _inputs() | logits | {"allow_neg_eigval": True},
        "one-token": _inputs(tokens=1) | final,
        "float16": _inputs(dtype=torch.float16) | final,
        "unknown-argument": _inputs() | {"output_attentions": False},
    }


def _calls_of_chunk():
    packed = {"cu_seqlens": torch.tensor([0, 20, T])}
    packed_on_host = packed | {"cu_seqlens_cpu": packed["cu_seqlens"]}
    indices = torch.tensor([[0, 0], [1, 0]])
    states = {"initial_state": _state(), "output_final_state": True}
    return {
        "two-chunks": _inputs(tokens=T) | states,
        "chunk-size-16": _inputs(tokens=T) | {"chunk_size": 16},
        "chunk-size-32": _inputs(tokens=T) | {"chunk_size": 32},
        "bounds-on-host": _inputs(1, T) | packed_on_host,
        "chunk-indices": _inputs(1, T) | packed | {"chunk_indices": indices},
    }


def _calls_of_recurrent():
    per_channel = {"gk": -torch.rand(B, FEW, HV, K), "output_final_state": True}
    bf16 = _inputs(dtype=torch.bfloat16)
    return {
        "gk": _inputs() | per_channel | {"g": None},
        "g-and-gk": _inputs() | per_channel,
        "no-decay": _inputs() | {"g": None},
        "bfloat16": bf16 | {"g": bf16["g"].bfloat16(), "beta": bf16["beta"].bfloat16()},
    }


def _cases():
    """Name -> (function, arguments, gradients of its two outputs or None)."""
    torch.manual_seed(0)
    cases = {}
    for function, own in ((CHUNK, _calls_of_chunk), (RECURRENT, _calls_of_recurrent)):
        for name, kwargs in (_calls_of_both() | own()).items():
            cases[f"{function}-{name}"] = function, kwargs, None
    kwargs = _inputs(tokens=T) | {"initial_state": _state(), "output_final_state": True}
    raw = {"use_gate_in_kernel": True, "A_log": torch.rand(HV).log(), "dt_bias": torch.randn(HV)}
    for name, extra in (("gradients", {}), ("gradients-gate", raw)):
        upstream = torch.randn(B, T, HV, V), torch.randn(B, HV, K, V)
        cases[f"{CHUNK}-{name}"] = CHUNK, kwargs | extra, upstream
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """FLA's answers to all cases, and its signatures."""
    pytest.importorskip("fla", reason="fla-core is not installed", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("fla")
    torch.save(list(CASES.values()), folder / "calls.pt")
    script = Path(__file__).with_name("fla_peer.py")
    command = [sys.executable, script, folder / "calls.pt", folder / "results.pt"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results, signatures = torch.load(folder / "results.pt")
    return dict(zip(CASES, results, strict=True)), signatures


def _assert_close(name, got, expected, rounded_to):
    assert got.shape == expected.shape, name
    assert got.dtype == expected.dtype, name
    bound = UNITS[rounded_to] * torch.finfo(rounded_to).eps * expected.abs().max()
    assert (got - expected).abs().max() <= bound, name


@pytest.mark.filterwarnings("ignore:.*transpose_state_layout is now called:DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_the_same_call_gives_the_same_answer(case, peer):
    function, kwargs, upstream = CASES[case]
    got = answer(getattr(ours, function), dict(kwargs), upstream)
    expected = peer[0][case]
    for name, x, fla_x in zip(("o", "final_state"), got, expected, strict=False):
        assert (x is None) == (fla_x is None), name
        if x is not None:
            assert x.is_contiguous(), name
            _assert_close(name, x, fla_x, kwargs["q"].dtype if function == CHUNK else fla_x.dtype)
    for name, gradient in (got[2] or {}).items():
        _assert_close(f"d{name}", gradient, expected[2][name], kwargs["q"].dtype)


@pytest.mark.parametrize("function", [CHUNK, RECURRENT])
def test_arguments_have_the_names_order_and_defaults_of_fla(function, peer):
    assert signature(getattr(ours, function)) == peer[1][function]


@pytest.mark.parametrize("function", [CHUNK, RECURRENT])
def test_the_call_compiles_to_one_graph_for_all_lengths(function):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    torch._dynamo.reset()
    call = getattr(ours, function)
    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 64, 67):
        gate = {"use_gate_in_kernel": True, "A_log": torch.rand(HV), "dt_bias": torch.rand(HV)}
        options = {"initial_state": _state(), "output_final_state": True}
        kwargs = _inputs(tokens=tokens) | gate | options
        for got, expected in zip(compiled(**kwargs), call(**kwargs), strict=True):
            assert torch.equal(got, expected)
    assert len(graphs) == 1


REFUSED = {
    "head_first must not be given": {"head_first": True},
    "transpose_state_layout must not be given beside state_v_first": {
        "state_v_first": True,
        "transpose_state_layout": True,
    },
    "A_log must be given with use_gate_in_kernel, got None": {"use_gate_in_kernel": True},
    "allow_neg_eigval must be False without use_beta_sigmoid_in_kernel": {"allow_neg_eigval": True},
    r"beta must have shape \[B, T, HV\] = \[2, 5, 4\], got \[2, 5, 1\]": {
        "beta": torch.rand(B, FEW, 1)
    },
}
REFUSED_BY_CHUNK = {"chunk_size must be 16, 32 or 64, got 128": {"chunk_size": 128}}
REFUSED_BY_RECURRENT = {
    "g must be given with use_gate_in_kernel, got None": {"g": None, "use_gate_in_kernel": True},
    "beta must be given with use_beta_sigmoid_in_kernel, got None": {
        "beta": None,
        "use_beta_sigmoid_in_kernel": True,
    },
}


@pytest.mark.parametrize(
    ("function", "message", "arguments"),
    [(CHUNK, *case) for case in (REFUSED | REFUSED_BY_CHUNK).items()]
    + [(RECURRENT, *case) for case in (REFUSED | REFUSED_BY_RECURRENT).items()],
)
def test_a_bad_call_is_refused_with_a_sentence(function, message, arguments):
    with pytest.raises(ValueError, match=f"^{function}: {message}"):
        getattr(ours, function)(**(_inputs() | arguments))


@pytest.mark.parametrize(
    ("function", "message", "arguments"),
    [
        (CHUNK, "cp_context must be None", {"cp_context": object()}),
        (RECURRENT, "gv must be None", {"gv": torch.zeros(B, FEW, HV, V)}),
        (RECURRENT, "beta must have shape", {"beta": torch.zeros(B, FEW, HV, V)}),
    ],
)
def test_what_is_not_offered_says_so(function, message, arguments):
    with pytest.raises(NotImplementedError, match=f"^{function}: {message}"):
        getattr(ours, function)(**(_inputs() | arguments))


@pytest.mark.parametrize("function", [CHUNK, RECURRENT])
def test_the_old_name_of_state_v_first_warns(function):
    with pytest.warns(DeprecationWarning, match="transpose_state_layout is now called"):
        getattr(ours, function)(**_inputs(), transpose_state_layout=False)
