"""The calls on which ``chunk`` and ``recurrent`` are compared with the oracle."""

import oracle
import torch
from inputs import Shape, cu_seqlens, make_inputs, make_state
from tolerance import assert_all_as_accurate_as_plain, operands_of, witnesses

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SHAPES = (
    Shape(B=1, T=1, H=1, HV=1, K=1, V=1),
    Shape(B=3, T=1, H=2, HV=2, K=32, V=16),
    Shape(B=1, T=63, H=1, HV=2, K=32, V=32),
    Shape(B=1, T=64, H=2, HV=6, K=64, V=48),
    Shape(B=2, T=65, H=2, HV=4, K=16, V=24),
    Shape(B=2, T=130, H=1, HV=3, K=24, V=40),
    Shape(B=1, T=130, H=1, HV=2, K=128, V=64),
    Shape(B=1, T=65, H=1, HV=1, K=256, V=20),
    Shape(B=1, T=70, H=2, HV=2, K=20, V=7),
    Shape(B=1, T=33, H=1, HV=1, K=100, V=3),
)

OPTION_SHAPE = Shape(B=2, T=67, H=2, HV=4, K=16, V=24)


def _channel_major(x):
    """The same values, time innermost in memory, as a convolution leaves them."""
    order = (0, *range(2, x.dim()), 1)
    back = (0, x.dim() - 1, *range(1, x.dim() - 1))
    return x.permute(order).contiguous().permute(back)


def _part_of_projection(x):
    """The same values inside a wider last dimension, as a projection of all of them leaves them."""
    return torch.cat([x.new_full(x.shape, torch.nan), x], -1)[..., x.shape[-1] :]


def _tokens(dtype=torch.float32, device="cpu", shape=OPTION_SHAPE, **options):
    return make_inputs(*shape, dtype, device=device, **options)


def _call(tokens, state=None, bounds=None, **options):
    """Arguments of a call, positional and by name."""
    return (*tokens, state, bounds), options


def _state(dtype=torch.float32, device="cpu", sequences=OPTION_SHAPE.B):
    _, _, _, HV, K, V = OPTION_SHAPE
    return make_state(sequences, HV, V, K, dtype, device=device)


def _packed(device, lengths, dtype=torch.int32):
    shape = OPTION_SHAPE._replace(B=1, T=140)
    bounds = cu_seqlens(lengths, dtype, device)
    return _call(_tokens(device=device, shape=shape), _state(device=device, sequences=5), bounds)


def _with_decay(device, value, kda=False):
    """The decay ``value`` at every third token."""
    tokens = _tokens(device=device, kda=kda)
    tokens.g[:, ::3] = value
    return _call(tokens, _state(device=device))


OPTIONS = {
    "no-decay": lambda d: _call(_tokens(device=d)._replace(g=None), _state(device=d)),
    "no-beta": lambda d: _call(_tokens(device=d)._replace(beta=None), _state(device=d)),
    "only-q-k-v": lambda d: _call(_tokens(device=d)._replace(g=None, beta=None)),
    "no-state": lambda d: _call(_tokens(device=d)),
    "state-bfloat16": lambda d: _call(_tokens(device=d), _state(torch.bfloat16, d)),
    "state-float16": lambda d: _call(_tokens(torch.bfloat16, d), _state(torch.float16, d)),
    "all-bfloat16": lambda d: _call(
        _tokens(torch.bfloat16, d, beta_dtype=torch.bfloat16), _state(torch.bfloat16, d)
    ),
    # Nothing is wider than float64 to sum strong decays in: chunks lose digits of exp(G_i - G_j).
    "float64": lambda d: _call(
        _tokens(torch.float64, d, strong_decay=False), _state(torch.float64, d)
    ),
    "scale": lambda d: _call(_tokens(device=d), _state(device=d), scale=0.7),
    "l2norm": lambda d: _call(
        _tokens(device=d, unit_keys=False), _state(device=d), use_qk_l2norm=True
    ),
    "l2norm-bfloat16": lambda d: _call(
        _tokens(torch.bfloat16, d, unit_keys=False), use_qk_l2norm=True, scale=1.0
    ),
    "negative-eigenvalues": lambda d: _call(_tokens(device=d, negative_eigenvalues=True)),
    "decay-per-channel": lambda d: _call(_tokens(device=d, kda=True), _state(device=d)),
    "decay-per-channel-bfloat16": lambda d: _call(
        _tokens(torch.bfloat16, d, kda=True, unit_keys=False), use_qk_l2norm=True
    ),
    "decay-of-100": lambda d: _with_decay(d, -100.0),
    "decay-of-100-per-channel": lambda d: _with_decay(d, -100.0, kda=True),
    "decay-of-infinity": lambda d: _with_decay(d, -torch.inf),
    "channel-major": lambda d: _call(_tokens(device=d).map(_channel_major), _state(device=d)),
    "part-of-projection": lambda d: _call(_tokens(device=d).map(_part_of_projection)),
    "state-with-gaps": lambda d: _call(_tokens(device=d), _part_of_projection(_state(device=d))),
    "packed": lambda d: _packed(d, (63, 0, 1, 65, 11)),
    "packed-int64-ends-early": lambda d: _packed(d, (0, 20, 20, 33, 0), torch.int64),
}


def shape_call(shape, dtype, device):
    """Every tensor given, the inputs in ``dtype``."""
    state = make_state(shape.B, shape.HV, shape.V, shape.K, device=device)
    return _call(_tokens(dtype, device, shape), state)


def assert_equals_oracle(operator, call):
    """``operator`` is as accurate as a plain loop on the call ``(args, options)``."""
    args, options = call
    operands = operands_of(operator, args[0].dtype)
    exact, plain = witnesses(oracle.delta_rule, *args, **options, operands=operands)
    actual = operator(*args, **options)
    assert_all_as_accurate_as_plain(actual, exact, plain, terms=args[0].shape[-1])
