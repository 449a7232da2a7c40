# `make demo` and `make test` work on a fresh clone: they make .venv, install what was tested, and run.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-slow test-gpu check setup format clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.ready  ## set up, then search where LoRA experts go in the embedded MoE model (offline, minutes)
	$(BIN)/python -m search.run space=sieve

test: $(VENV)/.ready  ## set up, then run the tests (one real Ray study included)
	$(BIN)/python -m pytest

test-slow: $(VENV)/.ready  ## the tests that take longer than a few seconds each
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.ready  ## the tests that need a GPU, then what the toolkit costs on it, into tests/benchmarks/RESULTS.md
	@# the benchmark runs where tests fail, too; the status says whether either failed
	$(BIN)/python -m pytest -m gpu; tests=$$?; $(BIN)/python -m tests.benchmarks.gpu write=true && exit $$tests

check: $(VENV)/.ready  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.ready  ## only make .venv and install

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@# torch first, so that what follows finds it and takes no second copy
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

clean:  ## remove what `setup` and the tests made (studies stay)
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
