"""Run a module that Inductor generated for a GPU on the CPU, in Triton's interpreter.

For tests in ``tests/interpreted``: TRITON_INTERPRET=1 must be set before triton is imported.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lowering.generated import Kernel, load


def run(code: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """The results of a generated module's ``call``, on CPU tensors; mutated ones are mutated.

    Args:
        code: Source of the module, of ``lowering.fake_gpu.generate``.
        args: Its arguments, in the order in which ``call`` unpacks them.
    """
    assert os.environ.get("TRITON_INTERPRET") == "1", "set before triton is imported"
    # Lanes that a mask hides compute all the same: 0 / 0 is no concern there.
    with torch.no_grad(), np.errstate(all="ignore"):
        return load(code, _launch, torch.device("cpu")).call(list(args))


def _launch(kernel: Kernel, args: Sequence[Any]) -> None:
    config = kernel.configs[0]
    bound = kernel.bind(config, args)
    grid = kernel.grid(config, bound)
    for name in kernel.inductor_meta.get("extra_launcher_args", ()):
        del bound[name]
    scope = kernel.fn.fn.__globals__
    if "libdevice" in scope:
        scope["libdevice"] = _Libdevice()
    constants = {k: v for k, v in config.constants.items() if k in kernel.fn.arg_names}
    kernel.fn[grid](**bound | kernel.meta["constants"] | constants)


def _elementwise(function: Callable[[float], float]) -> Callable[[Any], Any]:
    return np.vectorize(function, otypes=[np.float64])


# Where numpy has no function of the same name.
FUNCTIONS = {
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "erf": _elementwise(math.erf),
    "lgamma": _elementwise(math.lgamma),
    "nearbyint": np.rint,
    "pow": np.power,
    "isinfd": np.isinf,
}


class _Libdevice:
    """CUDA's mathematical functions, which the interpreter cannot call, by numpy's."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = FUNCTIONS.get(name) or getattr(np, name)

        def call(*operands: Any) -> Any:
            import triton.language as tl
            from triton.runtime.interpreter import TensorHandle

            first = operands[0]
            values = [x.handle.data if isinstance(x, tl.tensor) else x for x in operands]
            data = np.asarray(function(*values))
            if data.dtype == np.bool_:
                kind, data = tl.int1, data
            else:
                kind, data = first.dtype, data.astype(first.handle.data.dtype)
            shaped = tl.block_type(kind, list(data.shape)) if data.ndim else kind
            return tl.tensor(TensorHandle(data, kind), shaped)

        return call
