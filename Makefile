# `make help` lists what there is. Everything runs in .venv, which the first command creates.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
DEMO ?= demo

.PHONY: help demo test slow mutants check format constraints clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.stamp ## compare many ways to sample the bundled model on one page (2 minutes)
	$(BIN)/hasten compare fashion --variants fashion --minutes 1.7 --out $(DEMO)
	@echo "The report: $(CURDIR)/$(DEMO)/report.html"

test: $(VENV)/.stamp-dev ## the tests, without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n auto --dist loadfile

slow: $(VENV)/.stamp-dev ## the slow tests too
	$(BIN)/python -m pytest -q

mutants: $(VENV)/.stamp-dev ## apply the faults of tests/mutants.toml one by one and report those that no test sees
	$(BIN)/python -m tests.mutants

check: $(VENV)/.stamp-dev ## style, types, and the architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(VENV)/.stamp-dev ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: $(VENV)/.stamp-dev ## write constraints.txt from what is installed
	{ head -1 constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable | grep -vE '^(pip|hasten)\b' | sed 's/+.*//'; } > constraints.tmp
	mv constraints.tmp constraints.txt

clean: ## remove the environment and what the tools left behind
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "hasten needs Python 3.10 or later: none was found (set PYTHON=)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.stamp
