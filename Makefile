# `make help` lists what there is. Everything runs in .venv, which the first command creates.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
DEMO ?= demo
# written beside the sources and ignored by git: without them every command line that the tests start compiles 320 files
export PYTHONDONTWRITEBYTECODE :=
# what `make test-oldest` runs: the vocabulary, samplers, a network, the command line, pipelines
OLDEST := tests/core tests/test_schedules.py tests/test_times.py tests/test_predictions.py tests/test_plan.py tests/test_sampling.py \
	tests/test_model.py tests/test_pick.py tests/test_cli.py tests/samplers/test_contract.py tests/nets/test_unet.py \
	tests/metrics/test_frechet.py tests/adapters/test_scheduler.py tests/adapters/test_load.py tests/accelerators/test_deep_cache.py

.PHONY: help demo gpu test slow test-oldest mutants check format docs wheel constraints clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.stamp ## compare many configurations of the bundled model on one page (2 minutes)
	$(BIN)/hasten compare fashion --variants fashion --minutes 1.7 --out $(DEMO)
	@echo "The report: $(CURDIR)/$(DEMO)/report.html"

gpu: $(VENV)/.stamp-dev ## measure the headline figures on a GPU (5 minutes) and write them to gpu.md
	$(BIN)/python -m benchmarks.gpu --out gpu.md

test: $(VENV)/.stamp-dev ## the tests, without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n auto --dist loadfile

slow: $(VENV)/.stamp-dev ## the slow tests too
	$(BIN)/python -m pytest -q

test-oldest: ## a reduced set of tests with the lowest versions that pyproject.toml declares (in .venv-oldest; 3 GB)
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) tests/oldest.py > .venv-oldest/lowest.txt
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check -r .venv-oldest/lowest.txt
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q $(OLDEST)

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

docs: $(VENV)/.stamp-dev ## build the documentation into site/, warnings are errors
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The documentation: $(CURDIR)/site/index.html"

wheel: $(VENV)/.stamp-dev ## build an sdist and a wheel into dist/, install the wheel into a clean environment and sample with it
	rm -rf dist build/wheel-check
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv build/wheel-check
	build/wheel-check/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/wheel-check && bin/hasten sample fashion --n 4 --steps 4 --out sample.png

constraints: $(VENV)/.stamp-dev ## write constraints.txt from what is installed
	{ head -1 constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable | grep -vE '^(pip|hasten)\b' | sed 's/+.*//'; } > constraints.tmp
	mv constraints.tmp constraints.txt

clean: ## remove the environment and what the tools left behind
	rm -rf $(VENV) .venv-oldest demo build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "hasten needs Python 3.10 or later: none was found (set PYTHON=)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.stamp
