# `make demo` and `make test` need nothing but Python 3.11 or newer: each creates .venv by itself, as
# tests/matrix/install.py says.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Touched when the environment is whole, so that an interrupted install starts over.
STAMP := $(VENV)/.installed

# What is installed is compiled when it is first imported, which is a small part of it.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo check test timing attack matrix docs lint format clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Generate tokens with an MoE model through moe_forward, on whatever is here.
	@$(BIN)/moe-dispatch demo

check: lint  ## Lint, type-check and the tests that take seconds.
	$(BIN)/python -m pytest -n auto --dist worksteal -q -m "not slow and not timing and not matrix" tests/core tests/policies tests/benchmarks

test: lint  ## Lint, type-check and run every test; those that need a GPU skip themselves without one.
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not timing and not matrix"

timing: $(STAMP)  ## The tests that hold wall-clock bounds, alone on an idle machine.
	$(BIN)/python -m pytest -m timing

attack: $(STAMP)  ## More than 20,000 hostile calls, files, command lines and backends; figures in out/attack.json. SEED=… repeats one.
	$(BIN)/python -m pytest -n auto --dist load --attack=large --attack-figures=out/attack.json \
	  $(if $(SEED),--hypothesis-seed=$(SEED)) tests/attack

matrix: $(STAMP)  ## Every supported version, each in its own environment, and README's table of them; CELLS='core-torch211 …' for some.
	$(BIN)/nox $(if $(CELLS),-s $(CELLS)); ended=$$?; $(BIN)/python -m tests.matrix.table; exit $$ended

docs: $(STAMP)  ## Build the documentation into site/; any warning fails it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

lint: $(STAMP)  ## ruff and mypy --strict.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Let ruff repair what it can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and caches.
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info

$(STAMP): pyproject.toml constraints.txt requirements.lock requirements-cpu.lock requirements-cuda.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("moe_dispatch needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.12 …" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tests/matrix/install.py
	$(BIN)/python -m pip check --disable-pip-version-check
	@touch $@
