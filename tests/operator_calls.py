"""A call of every registered operator, unpacked and packed: name -> arguments and options."""

import torch
from inputs import cu_seqlens, generator, indices, make_convolution, make_inputs, make_state

import gdn_ops  # noqa: F401 it registers the operators

H, HV, K, V, D, W = 2, 4, 8, 6, 12, 4
LENGTHS = (3, 0, 5)
N = len(LENGTHS)


def _numbers(*sizes):
    return torch.randint(-16, 17, sizes, generator=generator(3)) / 8


def _delta_rule(packed):
    """Tokens, their initial states and the bounds."""
    tokens = make_inputs(1 if packed else N, sum(LENGTHS) if packed else 5, H, HV, K, V)
    return tokens, make_state(N, HV, V, K), cu_seqlens(LENGTHS) if packed else None


def _convolution(packed):
    tensors = make_convolution(1 if packed else N, sum(LENGTHS) if packed else 5, D, W)
    return tensors, _numbers(N, D, W - 1), cu_seqlens(LENGTHS) if packed else None


def _calls(packed):
    tokens, state, bounds = _delta_rule(packed)
    tensors, history, _ = _convolution(packed)
    options = {"scale": 0.5, "use_qk_l2norm": True}
    do, dy = torch.ones_like(tokens.v), torch.ones_like(tensors[0])
    pool, convolution_pool = make_state(9, HV, V, K), _numbers(9, D, W - 1 + 4)
    slots, read = indices([4, -1, 2]), indices([7, 0, 2])
    table, accepted = torch.arange(15).remainder(9).view(3, 5), indices([1, 5, 2])
    table[2] = -1
    has = torch.tensor([True, False, True])
    backward = (do, torch.ones_like(state), *tokens, state, bounds), options
    return {
        "chunk": [((*tokens, state, bounds), options), (tokens[:3], {})],
        "recurrent": [((*tokens, state, bounds), options), (tokens[:3], {})],
        "chunk_backward": [backward],
        "recurrent_backward": [backward],
        "chunk_": [((*tokens, pool, slots, has, bounds, read), options)],
        "recurrent_": [
            ((*tokens, pool, slots, None, bounds, read), options),
            ((*tokens, pool, table, accepted, bounds), {"null_index": 0}),
            ((*tokens, pool, table, accepted, bounds), {"exact": True}),
        ],
        "causal_conv1d": [
            ((*tensors, history, bounds), {"activation": "silu"}),
            (tensors[:2], {}),
        ],
        "causal_conv1d_backward": [
            ((dy, torch.ones_like(history), *tensors, history, bounds), {"activation": "silu"})
        ],
        "causal_conv1d_": [
            ((*tensors, convolution_pool, slots, None, bounds), {"activation": "silu"}),
            ((*tensors, convolution_pool, slots, accepted, bounds), {"null_index": 0}),
        ],
    }


CALLS = {
    f"{name}-{'packed' if packed else 'batch'}-{i}": (name, *call)
    for packed in (False, True)
    for name, calls in _calls(packed).items()
    for i, call in enumerate(calls)
}
# What autograd reaches: the functional operators with everything given.
DIFFERENTIABLE = [
    case
    for case, (name, *_) in CALLS.items()
    if name in ("chunk", "recurrent", "causal_conv1d") and case.endswith("-0")
]


def operator(name):
    return getattr(torch.ops.gdn, name).default


def fresh(case, requires_grad=False):
    """The operator, and copies of its arguments with the same strides."""
    name, args, options = CALLS[case]
    args = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    if requires_grad:
        args = [
            x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in args
        ]
    return operator(name), tuple(args), options
