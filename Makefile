# Everything lives in .venv; a target does set-up work only when pyproject.toml or constraints.txt has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
FUZZ_STAMP := $(VENV)/.installed-fuzz
WEB_STAMP := web/node_modules/.package-lock.json
DEMO_HOME ?= $(CURDIR)/.lorasmith
FUZZ_SECONDS ?= 600
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-faults fuzz lint types bench docs web client starter clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorasmith needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing lorasmith into $(VENV) (once)"
	$(PIP) install --constraint constraints.txt torch==2.13.0
	$(PIP) install --constraint constraints.txt --editable '.[all]'
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(PIP) install --constraint constraints.txt --requirement tools/dev-requirements.txt
	@touch $@

setup: $(STAMP) ## Install into .venv

demo: $(STAMP) ## Import, train, evaluate, export and answer on the built-in model and data
	@$(BIN)/lorasmith --home $(DEMO_HOME) demo

# One thread a worker: two torch processes of two threads each wait for each other most of the time. Files in the order of conftest.py.
test: $(DEV_STAMP) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not faults"

test-slow: $(DEV_STAMP) ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-faults: $(DEV_STAMP) ## Kill at every named step, then check what is left
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -rP --tb=short

$(FUZZ_STAMP): $(DEV_STAMP)
	$(PIP) install --constraint constraints.txt atheris
	@touch $@

fuzz: $(FUZZ_STAMP) ## Feed the parsers of data with broken input for ten minutes (FUZZ_SECONDS=60: one)
	$(BIN)/python -m tools.fuzz --seconds $(FUZZ_SECONDS)

lint: $(DEV_STAMP) ## Check style and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(DEV_STAMP) ## Check types
	$(BIN)/mypy

bench: $(DEV_STAMP) ## Run every benchmark
	@status=0; for file in $$(grep -l '^if __name__' benchmarks/*.py); do $(BIN)/python $$file || status=1; done; exit $$status

docs: $(DEV_STAMP) ## Write the generated reference pages
	$(BIN)/python -m tools.write_reference

$(WEB_STAMP): web/package.json web/package-lock.json
	npm --prefix web ci --ignore-scripts --no-audit --no-fund
	@touch $@

web: $(WEB_STAMP) ## Install what the TypeScript client needs, with node 18 or newer

client: $(WEB_STAMP) docs ## Write the types of the TypeScript client
	npm --prefix web run client

starter: $(DEV_STAMP) ## Build the starter model and data again (an hour)
	$(BIN)/python -m tools.starter.build

clean: ## Remove the virtual environment, caches and the demo's files
	rm -rf $(VENV) $(DEMO_HOME) dist build web/build web/node_modules .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .fuzz
	find . -name __pycache__ -prune -exec rm -rf {} +
