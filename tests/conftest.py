"""What every test runs under: one thread, memory that is NaN until it is written, a device."""

import os
import warnings

import hypothesis
import interpreter
import pytest
import torch

# cuBLAS refuses to run under deterministic algorithms without it; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The same examples on every machine and on every run: a failure is one that others can repeat.
hypothesis.settings.register_profile(
    "gdn", deadline=None, derandomize=True, database=None, max_examples=20
)
hypothesis.settings.load_profile("gdn")

# The same laws hold for the kernels: Triton's interpreter runs them on CPU tensors.
KERNELS_ARE_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if KERNELS_ARE_INTERPRETED:
    interpreter.repair()
    from gdn_ops import _library

    _on_cpu = torch.library.Library("gdn", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it takes the place of the operator in C
        for _name, _kernel in _library.KERNELS.items():
            _on_cpu.impl(_name, _kernel, "CPU", allow_override=True)

GPU_IS_REQUIRED = os.environ.get("GDN_REQUIRE_GPU") == "1"


def _devices():
    devices = ["cpu"]
    if torch.cuda.is_available() or GPU_IS_REQUIRED:
        devices.append(pytest.param("cuda", marks=pytest.mark.gpu))
    return devices


def pytest_runtest_setup(item):
    """What a test draws does not depend on the tests before it, of which a worker has any."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=_devices())
def device(request):
    """Where the operators under test run; the oracles always run on the CPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("GDN_REQUIRE_GPU=1, and torch finds no GPU")
    return request.param


@pytest.fixture(scope="module", params=["kernels"] if KERNELS_ARE_INTERPRETED else ["C", "PyTorch"])
def form(request, device):
    """On a CPU an operator in C, and what serves a call that the C does not, or has no compiler."""
    if request.param != "PyTorch":
        yield request.param
        return
    if device != "cpu":
        pytest.skip("a GPU has neither form")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GDN_PLAIN_CPU", "1")
        yield request.param


@pytest.fixture
def cuda(device):
    """Skips on a CPU; nothing is compiled before."""
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    torch.compiler.reset()


@pytest.fixture(scope="session", autouse=True)
def nan_filled_empties():
    """Fill what ``torch.empty`` and its kin return with NaN: what is left unwritten is seen."""
    # Shapes are small: a second thread costs more than it brings, on a busy machine seven times.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
