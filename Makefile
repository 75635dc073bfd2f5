# make venv: the environment. make demo: logs in, a critic trained, an answer in SQL. make test, lint, bench, clean.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# Where torch comes from if not from your package index, e.g. the URL of its CPU builds (0.2 GB rather than 3).
TORCH_INDEX ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Small matrix products that contend for the cores are many times slower: one thread a process.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help venv demo test lint bench clean

help:
	@head -n 1 Makefile

venv: $(INSTALLED)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, and $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that its index serves nothing else.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	rm -rf demo
	$(BIN)/python -m offline_lm.ingest path=datasets/shop store=demo/store
	$(BIN)/python -m offline_lm.fit algo=iql_lm data.store=demo/store model.stage.tokens=100_000 optim.steps=500
	$(BIN)/python -m offline_lm.query analysis/decisive_steps.sql run=latest store=demo/store

test: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# Every benchmark beside its peer, and the README's table anew; crash.py, fuzz.py and planted_secrets.py run apart.
bench: $(INSTALLED)
	$(BIN)/python analysis/benchmarks/run_all.py readme=README.md

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find offline_lm tests analysis -name __pycache__ -prune -exec rm -rf {} +
