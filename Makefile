# `make demo` and `make test` each do all their own set-up, in .venv at the repository root, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
EXPERT_PARALLEL_SIZE ?= 2
# What installing compiles.
NATIVE := $(wildcard kernels/moe_kernels/native/*.cpp kernels/moe_kernels/native/*.h moe_runtime/parallel/native/*.[ch])

# Two targets asked for at once share the virtual environment.
.NOTPARALLEL:
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

# A stamp is touched when its step is complete, so a step that failed or was interrupted is done again.
# No newer syntax than Python 2's in the check: an old Python has to be able to say that it is too old.
CHECK_PYTHON := import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	"moe_runtime needs Python 3.11 or newer, $(PYTHON) is %d.%d; pass PYTHON=python3.11" % v[:2])

# An environment whose pip runs is kept, whoever made it; any other is half made, and made anew.
$(VENV)/.created:
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c '$(CHECK_PYTHON)' && echo "making $(VENV)" && $(PYTHON) -m venv --clear $(VENV); }
	@touch $@

$(VENV)/.run-installed: pyproject.toml setup.py $(NATIVE) | $(VENV)/.created
	@echo "installing moe_runtime into $(VENV) (some minutes where torch and Ray have to be downloaded)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# What the tests need includes what running needs.
$(VENV)/.test-installed: pyproject.toml setup.py $(NATIVE) | $(VENV)/.created
	@echo "installing moe_runtime and its tests' needs into $(VENV) (some minutes where torch and Ray have to be downloaded)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $(VENV)/.run-installed $@
