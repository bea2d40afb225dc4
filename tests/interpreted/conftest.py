"""Kernels in Triton's interpreter: the environment must say so before triton is imported."""

import os
import sys

import pytest

os.environ["TRITON_INTERPRET"] = "1"
if "triton" in sys.modules:
    import triton

    assert triton.knobs.runtime.interpret, "triton was imported before TRITON_INTERPRET was set"


import interpreter

interpreter.repair()


@pytest.fixture(scope="session", autouse=True)
def nan_filled_empties():
    """Replaces the fixture of the suite: Triton's interpreter runs under deterministic algorithms
    too, and one thread is enough for its arrays."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
