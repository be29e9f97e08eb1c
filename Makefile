# `make demo`, `make test`, `make bench`: set up .venv when needed, then do what the name says.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$p --version >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A process per core: every test makes its own folders and needs one thread.
PARALLEL := --numprocesses auto --maxprocesses 4

.PHONY: setup demo test test-slow bench lint types docs clean

setup: $(STAMP)

# The tested versions where the platform offers them, else whatever the ranges allow.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.10 to 3.13 is needed and was not found"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' \
		|| { echo "The tested versions are not all on offer here: trying the ranges instead."; \
		$(BIN)/python -m pip install --quiet --editable '.[dev]'; }
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/omnigen-pipe demo --workspace demo

# Lint, types and tests, in that order whatever -j says.
test: $(STAMP)
	$(MAKE) lint
	$(MAKE) types
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PARALLEL)

# What each stage costs against bare loops, as a table and in bench.json: docs/performance.md.
# BENCH='--rows start' for some.
bench: $(STAMP)
	$(BIN)/python tests/benchmarks/bench.py --json bench.json $(BENCH)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
