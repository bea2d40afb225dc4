"""Every refusal is one sentence that names the argument, and comes before anything is written."""

import pytest
import torch
from inputs import indices, make_convolution, make_inputs, make_state
from torch._subclasses import FakeTensorMode

import gdn_ops

B, T, H, HV, K, V = 2, 5, 2, 4, 8, 6
D, W, S = 12, 4, 3
SLOTS = 7
META = torch.device("meta")


def _arguments(op):
    """A call that is right, by name; slots are one-dimensional."""
    if op.startswith("causal_conv1d"):
        x, weight, bias = make_convolution(B, T, D, W)
        arguments = {"x": x, "weight": weight, "bias": bias}
        state = torch.ones(SLOTS, D, W - 1 + S - 1)
        history = torch.ones(B, D, W - 1)
    else:
        arguments = make_inputs(B, T, H, HV, K, V)._asdict()
        state, history = make_state(SLOTS, HV, V, K), make_state(B, HV, V, K)
    if op.endswith("_"):
        return arguments | {"state": state, "state_indices": indices([4, 2])}
    return arguments | {"initial_state": history}


def _int(*sizes):
    return torch.zeros(sizes, dtype=torch.int32)


def _floats(*sizes):
    return torch.zeros(sizes)


INPUT_DTYPES = "float32 or bfloat16 or float16 or float64"
TABLE = indices([[0, 1, 2, 3, 5], [4, 6, -1, -1, -1]])

# Of every operator of the delta rule: arguments that replace those of the right call -> sentence.
DELTA_RULE = [
    ({"q": _floats(B, T, K)}, "q must have 4 dimensions [B, T, H, K], got [2, 5, 8]"),
    ({"q": _floats(B, 0, H, K)}, "q must have T >= 1, got [2, 0, 2, 8]"),
    ({"q": _floats(B, T, H, 0)}, "q must have K >= 1, got [2, 5, 2, 0]"),
    ({"q": _int(B, T, H, K)}, f"q must have dtype {INPUT_DTYPES}, got int32"),
    ({"k": _floats(B, T, 3, 8)}, "k must have shape [B, T, H, K] = [2, 5, 2, 8], got [2, 5, 3, 8]"),
    ({"k": _floats(B, T, H, K).half()}, "k must have dtype float32, got float16"),
    ({"v": _floats(B, T, HV)}, "v must have 4 dimensions [B, T, HV, V], got [2, 5, 4]"),
    (
        {"v": _floats(B, 4, HV, V)},
        "v must have shape [B, T, HV, V] = [2, 5, 4, 6], got [2, 4, 4, 6]",
    ),
    ({"v": _floats(B, T, HV, 0)}, "v must have V >= 1, got [2, 5, 4, 0]"),
    ({"v": _floats(B, T, 3, V)}, "v must have HV a multiple of H = 2, got HV = 3"),
    ({"v": _floats(B, T, HV, V).double()}, "v must have dtype float32, got float64"),
    ({"g": _floats(B, T, H)}, "g must have shape [B, T, HV] = [2, 5, 4], got [2, 5, 2]"),
    (
        {"g": _floats(B, T, HV, V)},
        "g must have shape [B, T, HV, K] = [2, 5, 4, 8], got [2, 5, 4, 6]",
    ),
    ({"g": _floats(B, T, HV).bfloat16()}, "g must have dtype float32, got bfloat16"),
    ({"beta": _floats(B, T)}, "beta must have shape [B, T, HV] = [2, 5, 4], got [2, 5]"),
    ({"beta": _floats(B, T, HV).half()}, "beta must have dtype float32, got float16"),
    ({"beta": _floats(B, T, HV).to(META)}, "beta must be on the device of q, cpu, got meta"),
]
CONVOLUTION = [
    ({"x": _floats(B, D)}, "x must have 3 dimensions [B, T, D], got [2, 12]"),
    ({"x": _floats(B, T, 0)}, "x must have D >= 1, got [2, 5, 0]"),
    ({"x": _int(B, T, D)}, f"x must have dtype {INPUT_DTYPES}, got int32"),
    ({"weight": _floats(D, 1, W)}, "weight must have 2 dimensions [D, W], got [12, 1, 4]"),
    ({"weight": _floats(W, D)}, "weight must have shape [D, W] = [12, 12], got [4, 12]"),
    ({"weight": _floats(D, 1)}, "weight must have W >= 2, got W = 1"),
    ({"weight": _floats(D, W).half()}, "weight must have dtype float32, got float16"),
    ({"bias": _floats(W)}, "bias must have shape [D] = [12], got [4]"),
    ({"bias": _floats(D).half()}, "bias must have dtype float32, got float16"),
    ({"bias": _floats(D).to(META)}, "bias must be on the device of x, cpu, got meta"),
    ({"activation": "relu"}, "activation must be None or 'silu', got 'relu'"),
]
BOUNDS = [
    (_floats(3), "cu_seqlens must have dtype int32 or int64, got float32"),
    (_int(1, 3), "cu_seqlens must have 1 dimensions [N + 1], got [1, 3]"),
    (_int(1), "cu_seqlens must have shape [N + 1] with N >= 1, got [1]"),
    (_int(3), "{first} must have B = 1 when cu_seqlens is given, got B = 2"),
]
FUNCTIONAL = {
    "delta rule": [
        (
            {"initial_state": _floats(B, HV, K, V)},
            "initial_state must have shape [N, HV, V, K] = [2, 4, 6, 8], got [2, 4, 8, 6]",
        ),
        (
            {"initial_state": _floats(B, HV, V, K).double()},
            "initial_state must have dtype float32 or bfloat16 or float16, got float64",
        ),
        (
            {"initial_state": _floats(B, HV, V, K).to(META)},
            "initial_state must be on the device of q, cpu, got meta",
        ),
    ],
    "convolution": [
        (
            {"initial_state": _floats(B, D, W)},
            "initial_state must have shape [N, D, W - 1] = [2, 12, 3], got [2, 12, 4]",
        ),
        (
            {"initial_state": _int(B, D, W - 1)},
            "initial_state must have dtype float32 or bfloat16 or float16, got int32",
        ),
    ],
}
SLOT_ARGUMENTS = [
    ({"state_indices": _floats(B)}, "state_indices must have dtype int32 or int64, got float32"),
    ({"state_indices": _int(3)}, "state_indices must have shape [N] = [2], got [3]"),
    (
        {"state_indices": _int(B).to(META)},
        "state_indices must be on the device of state, cpu, got meta",
    ),
    ({"null_index": -2}, "null_index must be at least -1, got -2"),
]
POOLS = [
    (
        {"state": _floats(SLOTS, HV, K, V)},
        "state must have shape [slots, HV, V, K] = [7, 4, 6, 8], got [7, 4, 8, 6]",
    ),
    ({"state": _floats(HV, V, K)}, "state must have 4 dimensions [slots, HV, V, K], got [4, 6, 8]"),
    ({"state": _floats(0, HV, V, K)}, "state must have slots >= 1, got [0, 4, 6, 8]"),
    (
        {"state": _floats(SLOTS, HV, V, K).double()},
        "state must have dtype float32 or bfloat16 or float16, got float64",
    ),
    (
        {"state": _floats(SLOTS, HV, K, V).mT},
        "state must have a contiguous [V, K] = [6, 8], got strides [1, 6]",
    ),
    (
        {"state": _floats(1, HV, V, K), "state_indices": None},
        "state must have a slot for each of N = 2 sequences when state_indices is None, "
        "got 1 slots",
    ),
    ({"read_indices": _int(B, 1)}, "read_indices must have shape [N] = [2], got [2, 1]"),
    ({"read_indices": _floats(B)}, "read_indices must have dtype int32 or int64, got float32"),
]
OF_ONE = {
    "chunk_": [
        ({"state_indices": _int(B, T)}, "state_indices must have 1 dimensions [N], got [2, 5]"),
        ({"has_initial_state": _int(B)}, "has_initial_state must have dtype bool, got int32"),
        (
            {"has_initial_state": torch.ones(3, dtype=torch.bool)},
            "has_initial_state must have shape [N] = [2], got [3]",
        ),
    ],
    "recurrent_": [
        (
            {"num_accepted_tokens": _int(B)},
            "num_accepted_tokens must come with a table state_indices [N, S], got shape [2]",
        ),
        (
            {"num_accepted_tokens": _int(B), "state_indices": None},
            "num_accepted_tokens must come with a table state_indices [N, S], got None",
        ),
        (
            {"state_indices": TABLE, "num_accepted_tokens": _int(B), "read_indices": _int(B)},
            "read_indices must be None with num_accepted_tokens, got both",
        ),
        (
            {"state_indices": TABLE, "num_accepted_tokens": _int(3)},
            "num_accepted_tokens must have shape [N] = [2], got [3]",
        ),
        (
            {"state_indices": _int(3, T)},
            "state_indices must have shape [N, S] = [2, 5], got [3, 5]",
        ),
        ({"state_indices": _int(B, 0)}, "state_indices must have S >= 1, got [2, 0]"),
        (
            {"state_indices": TABLE[:, :4]},
            "q must have T <= S = 4 tokens with a table [N, S], got 5",
        ),
    ],
    "causal_conv1d_": [
        (
            {"state": _floats(SLOTS, D)},
            "state must have 3 dimensions [slots, D, W - 1 + S - 1], got [7, 12]",
        ),
        (
            {"state": _floats(SLOTS, W, W)},
            "state must have shape [slots, D, W - 1 + S - 1] = [7, 12, 4], got [7, 4, 4]",
        ),
        (
            {"state": _floats(SLOTS, D, W - 2)},
            "state must have at least W - 1 = 3 columns, got 2",
        ),
        (
            {"state": _floats(1, D, W), "state_indices": None},
            "state must have a slot for each of N = 2 sequences when state_indices is None, "
            "got 1 slots",
        ),
        (
            {"num_accepted_tokens": _int(B)},
            "x must have T <= S = 3 tokens with num_accepted_tokens, got 5",
        ),
        (
            {"num_accepted_tokens": _floats(B)},
            "num_accepted_tokens must have dtype int32 or int64, got float32",
        ),
    ],
}


def _refusals():
    for op in ("chunk", "recurrent", "chunk_", "recurrent_", "causal_conv1d", "causal_conv1d_"):
        convolution = op.startswith("causal")
        cases = CONVOLUTION if convolution else DELTA_RULE
        first = "x" if convolution else "q"
        cases = cases + [({"cu_seqlens": x}, text.format(first=first)) for x, text in BOUNDS]
        if not op.endswith("_"):
            cases = cases + FUNCTIONAL["convolution" if convolution else "delta rule"]
        else:
            cases = cases + SLOT_ARGUMENTS + ([] if convolution else POOLS) + OF_ONE[op]
        for arguments, sentence in cases:
            yield pytest.param(op, arguments, sentence, id=f"{op}: {sentence}")


refusals = pytest.mark.parametrize(("op", "arguments", "sentence"), list(_refusals()))


def _assert_refused(op, arguments, error, message):
    """The call raises exactly this, and every tensor of it is what it was."""
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(error) as raised:
        getattr(gdn_ops, op)(**arguments)
    assert str(raised.value) == message
    for name, x in before.items():
        if x.device != META:
            assert torch.equal(arguments[name], x), name


@refusals
def test_a_wrong_argument_is_refused_with_a_sentence(op, arguments, sentence):
    arguments = _arguments(op) | arguments
    _assert_refused(op, arguments, ValueError, f"{op}: {sentence}")


@refusals
def test_the_compiler_meets_the_same_sentence(op, arguments, sentence):
    """Fakes check what the operators check, so that a wrong call fails when it is traced."""
    with FakeTensorMode() as mode:
        fakes = {
            name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for name, x in (_arguments(op) | arguments).items()
        }
        with pytest.raises(ValueError, match="must") as raised:
            getattr(gdn_ops, op)(**fakes)
    assert str(raised.value) == f"{op}: {sentence}"
