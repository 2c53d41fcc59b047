# `make demo` and `make test` each do all their own set-up, in .venv at the repository root, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
EXPERT_PARALLEL_SIZE ?= 2

.PHONY: demo test test-slow test-gpu lint clean

demo: $(VENV)/.run-installed
	$(BIN)/moe-runtime generate $(MODEL) --prompt "The experts of this model" --max-tokens 48 \
		--expert-parallel-size $(EXPERT_PARALLEL_SIZE)

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
		sys.exit(None if v >= (3, 11) else f"moe_runtime needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; pass PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.test-installed: $(VENV)/.run-installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@
