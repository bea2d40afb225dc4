# Every target sets up $(VENV) first, where it is missing or older than the pins.
PYTHON ?= python3
VENV ?= .venv
# Arguments for the target's command: make test ARGS="-k recurrent"
ARGS ?=
# What runs in Triton's interpreter: its own tests, and laws of the operators that it has time for.
INTERPRETED := tests/interpreted tests/test_recurrent_verify.py tests/test_recurrent_exact.py

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test matrix transformers-matrix lint bench static train gpu-test gpu-bench clean

demo: $(STAMP)
	$(BIN)/python examples/generate.py $(ARGS)

# First the kernels, in Triton's interpreter, which must be chosen before triton is imported; then all
# else. A choice of tests may leave nothing to the first (pytest's exit code 5).
test: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --dist worksteal $(INTERPRETED) $(ARGS) || test $$? = 5
	$(BIN)/python -m pytest -n auto --dist worksteal --ignore tests/interpreted $(ARGS)

# Code that is generated and compiled for GPUs, with each torch that is served: make matrix ARGS=2.11
matrix:
	$(PYTHON) .ci/matrix.py $(ARGS)

# Models under every release of transformers that is served: make transformers-matrix ARGS="4.57 5.23"
transformers-matrix: $(STAMP)
	$(BIN)/python .ci/transformers_matrix.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks cpu $(ARGS)

# What can be read off compiled kernels: make static ARGS=--check, make static ARGS=--accept
static: $(STAMP)
	$(BIN)/python -m benchmarks.static $(ARGS)

train: $(STAMP)
	$(BIN)/python examples/train.py $(ARGS)

# On a machine with a GPU and its own torch, in the Python that has it: nothing is set up.
gpu-test:
	$(PYTHON) .ci/gpu_test.py $(ARGS)

gpu-bench:
	$(PYTHON) -m benchmarks gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, so that nothing else decides which build of it is installed. The build back end
# comes before the project, so that its version is pinned too.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): some minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable ".[test,examples,bench,dev]"
	@touch $@
