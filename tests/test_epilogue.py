"""Where nothing can be fused into the output of a prefill, its store is that of eager mode."""

import logging
import re

import pytest
import torch
from inputs import cu_seqlens, indices
from launches_to_compile import new
from torch.nn import functional as F

import gdn_ops
from gdn_ops.kernels.configs import is_tight
from lowering import epilogue
from lowering.fake_gpu import generate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

B, T, H, HV, K, V = 2, 100, 2, 4, 64, 64


def _tokens(B=B, T=T, H=H, HV=HV, K=K, V=V, dtype=torch.bfloat16):
    q, k = new(B, T, H, K, dtype=dtype), new(B, T, H, K, dtype=dtype)
    v, g = new(B, T, HV, V, dtype=dtype), new(B, T, HV, dtype=torch.float32)
    return q, k, v, g, new(B, T, HV, dtype=dtype)


def _prefill(follows, arch="sm_90"):
    """The module of a prefill and what follows it, a function of ``o z w n``."""

    def layer(q, k, v, g, beta, z, w, n):
        return follows(gdn_ops.chunk(q, k, v, g, beta)[0], z, w, n)

    arguments = (*_tokens(), new(B, T, HV, V), new(HV * V, 32), new(V))
    (module,) = generate(layer, arguments, arch=arch)
    return module


def _constant(module, name):
    (value,) = re.findall(rf"^ *{name} : tl\.constexpr = (.*)$", module.code, re.MULTILINE)
    return value


def _is_late(module):
    return _constant(module, "USE_DESCRIPTOR_STORE") == "True"


def project(x, w):
    return x.flatten(2) @ w


@torch.library.custom_op("test_epilogue::mark", mutates_args=(), device_types="cuda")
def mark(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@mark.register_fake
def _(x):
    return torch.empty_like(x)


NOTHING_FUSES = {
    "result": lambda o, z, w, n: o,
    "product": lambda o, z, w, n: project(o, w),
    "view": lambda o, z, w, n: o.transpose(1, 2).unsqueeze(0),
    "gated norm": lambda o, z, w, n: gdn_ops.rms_norm_gated(o, z, n),
    "norm": lambda o, z, w, n: F.rms_norm(o, (V,), n),
    "layer norm": lambda o, z, w, n: F.layer_norm(o, (V,), n),
    "norm and result": lambda o, z, w, n: (F.rms_norm(o, (V,), n), o),
    "after a product": lambda o, z, w, n: project(o, w) + o.flatten(2)[..., :32],
    "scaled by its largest": lambda o, z, w, n: o / o.abs().amax(-1, keepdim=True),
    "loss": lambda o, z, w, n: o.float().square().mean(),
    "last token": lambda o, z, w, n: o[:, -1] * 2,
    "one to many": lambda o, z, w, n: o.unsqueeze(0).expand(3, *o.shape) * 2,
    "written to an input": lambda o, z, w, n: z.copy_(o),
    "opaque": lambda o, z, w, n: mark(o),
    "another operator": lambda o, z, w, n: gdn_ops.causal_conv1d(
        o.flatten(2), w.new_ones(HV * V, 4)
    )[0],
}
FUSES = {
    "gate": lambda o, z, w, n: o * F.silu(z),
    "gate before a product": lambda o, z, w, n: project(o * F.silu(z), w),
    "residual": lambda o, z, w, n: o + z,
    "cast": lambda o, z, w, n: o.float(),
    "choice": lambda o, z, w, n: torch.where(z > 0, o, 0),
    "beside a product": lambda o, z, w, n: (project(o, w), o * z),
    "of two": lambda o, z, w, n: (o.float() + 1, o * z),
}
# Inductor fuses none of these either; a rule that knew it would have to know more of Inductor.
IN_DOUBT = {
    "gate before a norm": lambda o, z, w, n: F.rms_norm(o * F.silu(z), (V,), n),
    "halves": lambda o, z, w, n: torch.cat([o[..., :32] * 2, o[..., 32:] * 3], -1),
    "other order": lambda o, z, w, n: o.transpose(1, 2).contiguous(),
    "sums": lambda o, z, w, n: o.cumsum(1),
    "norm of much": lambda o, z, w, n: F.rms_norm(o.float().sin().cos().sin().cos(), (V,)),
    "opaque, of a product": lambda o, z, w, n: mark(o * 2),
}


def _params(cases):
    return pytest.mark.parametrize("follows", [pytest.param(f, id=x) for x, f in cases.items()])


@_params(NOTHING_FUSES)
def test_a_descriptor_stores_the_output_where_inductor_fuses_nothing(follows, monkeypatch):
    """The other form has as many launches: so nothing that it would fuse is missed."""
    module = _prefill(follows)
    assert _is_late(module)
    monkeypatch.setattr(epilogue, "may_be_fused", lambda node: node)
    other = _prefill(follows)
    assert not _is_late(other)
    assert len(module.launches) == len(other.launches)


@_params(FUSES)
def test_what_inductor_can_fuse_is_fused(follows):
    module = _prefill(follows)
    assert not _is_late(module)
    assert [launch.kernel.kind for launch in module.launches] == ["template"] * 2


@_params(IN_DOUBT)
def test_in_doubt_the_output_is_stored_where_inductor_can_fuse(follows):
    assert not _is_late(_prefill(follows))


def test_a_state_that_is_read_too_is_no_reason_to_store_through_pointers():
    def layer(*tokens):
        o, state = gdn_ops.chunk(*tokens)
        return o, state.bfloat16() * 2

    (module,) = generate(layer, _tokens())
    assert _is_late(module)


@pytest.mark.parametrize("is_packed", [False, True], ids=["batch", "packed"])
def test_prefill_into_a_pool_of_any_length_is_stored_by_a_descriptor(is_packed):
    def layer(n, *arguments):
        return F.rms_norm(gdn_ops.chunk_(*arguments, use_qk_l2norm=True), (V,), n)

    tokens = _tokens(B=1 if is_packed else 3)
    for x in tokens:
        torch._dynamo.mark_dynamic(x, 1)
    bounds = cu_seqlens([40, 0, 60]) if is_packed else None
    arguments = (*tokens, new(9, HV, V, K), indices([3, 1, -1]), None, bounds)
    (module,) = generate(layer, (new(V), *arguments))
    assert _is_late(module)
    assert [x for x in module.inputs if isinstance(x, int)] == [T]


@pytest.mark.parametrize(
    ("shape", "arch", "tiles", "is_late"),
    [
        ({"K": 128, "V": 128, "HV": 32}, "sm_90", (64, 4, 3), True),
        ({"K": 128, "V": 128, "HV": 32, "B": 16}, "sm_90", (128, 8, 3), True),
        ({"K": 32}, "sm_90", (16, 4, 3), True),
        ({"K": 256}, "sm_90", (32, 8, 2) if is_tight("sm_90") else (64, 8, 1), False),
        ({"V": 60}, "sm_90", (64, 4, 3), False),
        ({"dtype": torch.float32}, "sm_90", (32, 8, 1), False),
        ({}, "sm_80", (64, 4, 2), False),
        ({}, "sm_100", (32, 4, 3), False),
    ],
    ids=str,
)
def test_the_plain_scan_is_launched_as_in_eager_mode(shape, arch, tiles, is_late, monkeypatch):
    from benchmarks.static.launches import record
    from gdn_ops.kernels import chunk, chunk_hopper

    monkeypatch.setattr(chunk_hopper, "GLUON", ())  # where there are, both may have others
    tokens = _tokens(**shape)
    (module,) = generate(gdn_ops.chunk, tokens, arch=arch)
    eager = record(lambda: chunk.chunk(*tokens), arch)[-1]
    config = module.launches[-1].kernel.configs[0]
    expected = [eager.args["BV"], eager.num_warps, eager.num_stages]
    found = [int(_constant(module, "BV")), config.num_warps, config.num_stages]
    assert found == expected == list(tiles)
    assert _is_late(module) == eager.args["USE_DESCRIPTOR_STORE"] == is_late


@pytest.mark.parametrize(
    ("follows", "arch", "why"),
    [
        (
            NOTHING_FUSES["result"],
            "sm_90",
            "by a descriptor: nothing can be fused into the store",
        ),
        (FUSES["gate"], "sm_90", "through pointers: mul may be fused into the store"),
        (IN_DOUBT["sums"], "sm_90", "through pointers: cumsum may be fused into the store"),
        (
            NOTHING_FUSES["result"],
            "sm_80",
            "through pointers: its inputs are not read by descriptors",
        ),
        (
            NOTHING_FUSES["result"],
            "sm_100",
            "through pointers: K = 64 on sm_100 leaves no room for its tile",
        ),
    ],
    ids=["descriptor", "fused", "unknown", "no descriptors", "no room"],
)
def test_the_log_says_how_the_output_is_stored_and_why(follows, arch, why, caplog):
    with caplog.at_level(logging.DEBUG, logger="lowering"):
        _prefill(follows, arch)
    assert f"gdn_chunk_scan: o is stored {why}" in caplog.messages
