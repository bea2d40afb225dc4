"""Flash Linear Attention on a CPU: its Triton kernels under Triton's interpreter.

Run as a script, in a process of its own, because the interpreter is chosen when triton is imported:

    python fla_peer.py calls.pt results.pt
"""

import builtins
import inspect
import os
import sys

import torch


class _LoopIndex(int):
    """FLA's kernels call ``.to(tl.int64)`` on a loop index; the interpreter hands them an int."""

    def to(self, _):
        return self


def load_fla():
    """The module with FLA's two functions, ready to run on a CPU."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.autotuner import Autotuner

    # There is nothing to time here: every configuration counts as equally fast, the first is used.
    Autotuner._bench = lambda *args, **kwargs: [0.0, 0.0, 0.0]
    import fla.ops.gated_delta_rule

    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops."):
            module.range = lambda *bounds: map(_LoopIndex, builtins.range(*bounds))
    return fla.ops.gated_delta_rule


def signature(function):
    """Names, kinds and spelled defaults of the parameters, without their annotations."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, repr(p.default)) for p in parameters]


def answer(function, kwargs, upstream):
    """Outputs of one call and, if gradients of them are given, the gradients of its tensors."""
    if upstream is None:
        return *function(**kwargs), None
    leaves = {
        name: x.requires_grad_()
        for name, x in kwargs.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    outputs = function(**kwargs)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return *(x.detach() for x in outputs), dict(zip(leaves, gradients, strict=True))


def main():
    calls_file, results_file = sys.argv[1:]
    fla = load_fla()
    calls = torch.load(calls_file)
    results = [answer(getattr(fla, name), kwargs, upstream) for name, kwargs, upstream in calls]
    signatures = {name: signature(getattr(fla, name)) for name, _, _ in calls}
    torch.save((results, signatures), results_file)


if __name__ == "__main__":
    main()
