# The environment is made when it is missing, and brought up to date when pyproject.toml changes.

METHOD ?= fedssp
ARGS ?=
# The workloads of fedavg and gin and their peers' scripts, which are not part of the project.
export BENCH_DIR ?= ../shared/bench
# What `make bench` times, minutes each; ARGS=--full takes them at length (BENCH=lora: one alone).
BENCH ?= $(if $(wildcard $(BENCH_DIR)/common.py),fedavg gin lora) ggeur_generation acgkd_generation
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help train eval compare test lint format bench docs demos clean
.DEFAULT_GOAL := help

help:  ## Show this help
	@echo "make TARGET [METHOD=name] [ARGS='--key value ...'], e.g. make train METHOD=fedssp ARGS='--seed 2'"
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

train: $(READY)  ## Train METHOD on its embedded data; again: continue
	$(BIN)/python -m train.run --method $(METHOD) $(ARGS)

eval: $(READY)  ## Evaluate the last checkpoint of METHOD: table, results.json, report.html
	$(BIN)/python -m eval.run --method $(METHOD) $(ARGS)

compare: $(READY)  ## Train METHOD and its baselines, 5 seeds each: one table, one picture
	$(BIN)/python -m eval.compare --method $(METHOD) $(ARGS)

test: lint  ## Lint, check the import contract, run the tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)  ## Check style, format, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## Time us beside the peers, whose environments are made in .peers/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@test -f $(BENCH_DIR)/common.py || echo "no common.py in BENCH_DIR=$(BENCH_DIR): fedavg, gin and lora are left out"
	for name in $(BENCH); do \
	  case $$name in \
	    fedavg|gin|lora) \
	      peer=$$($(BIN)/python -m benchmarks.peers $$name) || exit 1; \
	      words="--bench $(BENCH_DIR) --peer_python $$peer $(ARGS)";; \
	    *) words="$(filter-out --full,$(ARGS))";; \
	  esac; \
	  echo "== $$name"; $(BIN)/python -m benchmarks.$$name $$words || exit 1; \
	done

docs: $(READY)  ## Build the docs site: docs/_build/index.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

demos: $(READY)  ## Run the notebooks anew and keep small outputs (ARGS=fedssp: one alone)
	$(BIN)/python -m demos.refresh $(ARGS)

clean:  ## Remove the environment and all caches; runs/ stays
	rm -rf $(VENV) build docs/_build docs/api docs/methods *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@
