# Everything runs in .venv, which the first target that needs it sets up. Another interpreter: make test PYTHON=python3.12
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-long mutate check bench docs clean
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

# A PYTHON given by hand that is not the environment's makes a new environment.
ifneq ($(origin PYTHON),undefined)
python_version = $(shell $(1) -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)
ifneq ($(call python_version,$(PYTHON)),$(call python_version,$(BIN)/python))
.PHONY: $(STAMP)
endif
endif
PYTHON ?= python3

# Keeps a user's own packages and settings out of the checkout's environment.
export PYTHONNOUSERSITE := 1
unexport PYTHONHOME

help: ## show this list
	@echo "Usage: make TARGET [PYTHON=python3.12]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

setup: $(STAMP) ## set up .venv (the other targets do so by themselves)

# One recipe sets the environment up, and again when what it was made from changes or when an earlier try was cut short.
$(STAMP): setup.py pyproject.toml .ci/setup_venv $(wildcard constraints/*.txt)
	@bash .ci/setup_venv "$(PYTHON)" "$(VENV)"

demo: $(STAMP) ## a synthetic forest to training shards, a model, scores, a map: demo_out/
	@$(BIN)/python -m launch.demo

# Two processes, each with its own share of the tests: most of them wait for one core.
test: $(STAMP) ## the quick tests
	$(PYTEST) -m "not slow and not long" -n 2 --dist worksteal

# The demo runs alone and as users run it, so that its time can be compared. Numbers have to agree with the references
# as they are compiled for users, and on CPUs without AVX-512 and without AVX, which round otherwise.
test-slow: $(STAMP) ## the tests marked slow
	$(PYTEST) -m "slow and not long" -n 2 --dist worksteal --ignore tests/end_to_end/test_demo.py
	XLA_FLAGS= $(PYTEST) -m slow tests/end_to_end/test_demo.py
	XLA_FLAGS=--xla_cpu_max_isa=AVX2 $(PYTEST) -m "not long" -n 2 --dist worksteal tests/parity
	XLA_FLAGS=--xla_cpu_max_isa=SSE4_2 $(PYTEST) -m "not slow and not long" -n 2 --dist worksteal tests/parity

test-long: $(STAMP) ## the tests marked long: meshes, processes, sweeps, what a pretraining learns
	$(PYTEST) -m long

mutate: $(STAMP) ## put faults into a copy of the packages; a test has to notice each
	$(BIN)/python -m tests.mutation.mutate

check: $(STAMP) ## formatting, lint, types, import rules
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(PYTEST) tests/test_structure.py

bench: $(STAMP) ## speed beside the PyTorch original; installs torch and rioxarray
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m benchmarks.run

docs: $(STAMP) ## the documentation as a site: site/index.html; installs mkdocs-material
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[site]'
	$(BIN)/python -m mkdocs build

clean: ## remove .venv, caches, site and demo_out
	rm -rf $(VENV) .cache demo_out site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
