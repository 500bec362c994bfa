# `make demo` and `make test` need Linux and a Python >= 3.11 with pip and venv; everything else goes into .venv.

VENV := .venv
BIN := $(VENV)/bin
CPU_TORCH := torch==2.13.0
PACKAGES := dist_vlm

# The first Python that runs (a shim may exist and not), is new enough, and can make a virtual environment.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: demo test parity check format clean

demo: $(VENV)/.run-installed
	@$(BIN)/python examples/demo/run.py

# Files run beside each other, in their order: half of their time is spent waiting for processes that start.
test: $(VENV)/.dev-installed
	@$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Every point of the parity matrix on 64 prompts; `make test` runs a pairwise part on 4 to 12.
parity: $(VENV)/.dev-installed
	@$(BIN)/pytest tests/parity --full-matrix

check: $(VENV)/.dev-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(PACKAGES)
	scripts/check_packages.sh $(BIN)/python

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.run-installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with pip and venv found (python3.12, python3.11, python3)" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@# Without a GPU, torch comes first and in this exact version: no CUDA packages follow.
	ls /dev/nvidia[0-9]* >/dev/null 2>&1 || nvidia-smi -L >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet "$(CPU_TORCH)"
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.run-installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@
