"""The rows of the benchmark of a CPU, the calls of each side, and whether the sides agree."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

import gdn_ops

Tensors = tuple[torch.Tensor, ...]
Call = Callable[[], Tensors]

SIDES = ("ours", "ours_compiled", "theirs", "theirs_compiled")


@dataclass(frozen=True)
class Row:
    """One comparison; ``speed`` and ``memory`` are the targets, None where there is none."""

    name: str  # prefill, train, decode_ (in place) or decode
    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    speed: float | None = None  # at least so many times as fast
    memory: float | None = None  # at most this part of the peak memory

    @property
    def shape(self) -> tuple[int, ...]:
        return self.B, self.T, self.H, self.HV, self.K, self.V

    @property
    def measures_memory(self) -> bool:
        return self.name in ("prefill", "train")


ROWS = (
    Row("prefill", 1, 2048, 16, 32, 128, 128, speed=2, memory=0.5),
    Row("prefill", 4, 256, 16, 32, 128, 128, speed=2, memory=0.5),
    Row("train", 4, 256, 16, 32, 128, 128),
    Row("train", 8, 512, 2, 4, 32, 32),
    Row("decode_", 1, 1, 16, 32, 128, 128, speed=1),
    Row("decode_", 16, 1, 16, 32, 128, 128, speed=5),
    Row("decode", 1, 1, 16, 32, 128, 128),
    Row("decode", 16, 1, 16, 32, 128, 128),
)


def hugging_face():
    """The two functions of the model code, without the dispatch to an installed library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that find no GPU
        from transformers.models.qwen3_next import modeling_qwen3_next as model_code
    functions = (
        model_code.torch_chunk_gated_delta_rule,
        model_code.torch_recurrent_gated_delta_rule,
    )
    return [getattr(function, "__wrapped__", function) for function in functions]


def make_inputs(row: Row) -> list[torch.Tensor]:
    """``q k v g beta`` and a V-major state: what a layer of the model passes on, in float32."""
    random = torch.Generator().manual_seed(0)
    B, T, H, HV, K, V = row.shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random)

    # A in [1, 16] and a time step of 0.001 to 0.1, as checkpoints are initialised.
    A = 1 + 15 * torch.rand(HV, generator=random)
    time_step = 10 ** (-3 + 2 * torch.rand(HV, generator=random))
    dt_bias = time_step + torch.log(-torch.expm1(-time_step))
    g = gdn_ops.gdn_gate(normal(B, T, HV), A.log(), dt_bias)
    beta = normal(B, T, HV).sigmoid()
    q, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, HV, V)
    return [q, k, v, g, beta, 0.1 * normal(B, HV, V, K)]


def make_output_gradients(row: Row) -> list[torch.Tensor]:
    """Of ``o`` and of a V-major final state, as the rest of a model would hand them back."""
    random = torch.Generator().manual_seed(1)
    B, T, _, HV, K, V = row.shape
    return [torch.randn(size, generator=random) for size in ((B, T, HV, V), (B, HV, V, K))]


def our_call(row: Row, inputs: list[torch.Tensor]) -> Call:
    *tokens, state = inputs
    if row.name == "decode_":
        return lambda: (gdn_ops.recurrent_(*tokens, state, use_qk_l2norm=True), state)
    function = gdn_ops.recurrent if row.name == "decode" else gdn_ops.chunk
    return lambda: function(*tokens, state, use_qk_l2norm=True)


def their_call(row: Row, inputs: list[torch.Tensor]) -> Call:
    chunked, recurrent = hugging_face()
    function = chunked if row.name in ("prefill", "train") else recurrent
    q, k, v, g, beta, state = inputs
    # Their state is K-major: a contiguous one, but a view where the gradient of ours is wanted.
    keywords = {
        "g": g,
        "beta": beta,
        "initial_state": state.mT if state.requires_grad else state.mT.contiguous(),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }
    return lambda: function(q, k, v, **keywords)


def make_call(row: Row, side: str, inputs: list[torch.Tensor]) -> Call:
    """A call of one side; it returns the outputs and, for training, the gradients."""
    forward = (our_call if side.startswith("ours") else their_call)(row, inputs)
    if side.endswith("_compiled"):
        forward = torch.compile(forward, fullgraph=True, dynamic=False)

    def inference() -> Tensors:
        with torch.no_grad():
            return forward()

    if row.name != "train":
        return inference
    do, dstate = make_output_gradients(row)
    dstate = dstate if side.startswith("ours") else dstate.mT.contiguous()

    def training() -> Tensors:
        results = forward()
        return *results, *torch.autograd.grad(results, inputs, (do, dstate))

    return training


def exact_answer(row: Row, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same in float64, token by token, from the formula."""
    inputs = [x.detach().double().requires_grad_(row.name == "train") for x in inputs]
    q, k, v, g, beta, S = inputs
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    repeats = row.HV // row.H
    q = q.repeat_interleave(repeats, 2) * row.K**-0.5
    k = k.repeat_interleave(repeats, 2)
    outputs = []
    for t in range(q.shape[1]):
        S = g[:, t, :, None, None].exp() * S
        u = beta[:, t, :, None] * (v[:, t] - (S @ k[:, t, :, :, None]).squeeze(-1))
        S = S + u[..., :, None] * k[:, t, :, None, :]
        outputs.append((S @ q[:, t, :, :, None]).squeeze(-1))
    o = torch.stack(outputs, 1)
    if row.name != "train":
        return [o, S]
    gradients = [x.double() for x in make_output_gradients(row)]
    return [o, S, *torch.autograd.grad((o, S), inputs, gradients)]


def largest(x: torch.Tensor) -> float:
    return x.detach().abs().max().item()


def check(row: Row) -> None:
    """Compare all sides with the exact answer, on two key heads and at most 100 tokens.

    Raises:
        SystemExit: an error is more than twice that of theirs in eager mode, beyond the rounding of
            a sum of ``K`` terms.
    """
    torch._dynamo.reset()
    small = Row(row.name, 1, min(row.T, 100), 2, 2 * row.HV // row.H, row.K, row.V)
    errors = {}
    for side in SIDES:
        inputs = [x.requires_grad_(row.name == "train") for x in make_inputs(small)]
        exact = exact_answer(small, inputs)
        o, final_state, *gradients = make_call(small, side, inputs)()
        answer = [o, final_state if side.startswith("ours") else final_state.mT, *gradients]
        errors[side] = [largest(x.double() - y) for x, y in zip(answer, exact, strict=True)]
    rounding = [row.K**0.5 * torch.finfo(torch.float32).eps * largest(x) for x in exact]
    for side in SIDES:
        for error, theirs, slack in zip(errors[side], errors["theirs"], rounding, strict=True):
            if not error <= 2 * theirs + slack:
                name = f"{row.name} {row.shape}: {side}"
                raise SystemExit(f"{name} is off by {error:.3g}, theirs by {theirs:.3g}")
