"""Hugging Face's functions of Qwen3-Next as a second witness, computed in float64."""

import inspect
from unittest import mock

import torch
from transformers.models.qwen3_next import modeling_qwen3_next as modeling


class _Float64Torch:
    """The module ``torch`` for code that casts to ``torch.float32`` by name."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def delta_rule(name, q, k, v, g, beta, initial_state, **options):
    """``o`` and ``final_state [N, HV, V, K]`` of the function ``name``, in float64."""
    # Behind a decorator that may hand the call to kernels, where they are installed.
    function = inspect.unwrap(getattr(modeling, name))
    # Model code of transformers 5.17 and older repeats the heads outside of the function.
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    tokens = (x.cpu().double() for x in (q, k, v, g, beta))
    state = None if initial_state is None else initial_state.cpu().double().mT
    with mock.patch.object(modeling, "torch", _Float64Torch()):
        o, final_state = function(*tokens, initial_state=state, output_final_state=True, **options)
    return o, final_state.mT


def causal_conv1d(x, weight, bias, activation):
    """``y [B, T, D]`` of the convolution before the delta rule, in float64."""
    x, weight, bias = (None if t is None else t.cpu().double() for t in (x, weight, bias))
    return inspect.unwrap(modeling.causal_conv1d_fn)(x.mT, weight, bias, activation).mT


def causal_conv1d_update(x, state, weight, bias, activation):
    """``y [B, T, D]`` and the state after it, in float64."""
    x, state, weight, bias = (
        None if t is None else t.cpu().double().clone() for t in (x, state, weight, bias)
    )
    update = inspect.unwrap(modeling.causal_conv1d_update)
    return update(x.mT, state, weight, bias, activation).mT, state


def assert_same_function(actual, expected):
    """Two float64 results of one function lie closer than float32 numbers can tell apart."""
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype == torch.float64
        assert x.shape == y.shape
        assert (x.cpu() - y).abs().max() <= torch.finfo(torch.float32).eps * y.abs().max()
