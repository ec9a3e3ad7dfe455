# `make` alone lists the targets. Everything needed is set up on the first call, in .venv; nothing else is touched.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)
# Handed to `pip install torch` alone, for instance the index of PyTorch's CPU builds where PyPI's wheel brings CUDA.
TORCH_PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(CONSTRAINTS))
PYTEST_ARGS ?=

ifneq ($(wildcard ../shared/data),)
export FOREWORD_DATA ?= $(abspath ../shared/data)
endif
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-oldest check fix docs bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 found; install one, or say make PYTHON=/path/to/python"; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON), some minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --upgrade pip hatchling
	$(BIN)/python -m pip install $(TORCH) -c $(CONSTRAINTS) $(TORCH_PIP_ARGS)
	$(BIN)/python -m pip install --no-build-isolation -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: $(STAMP) ## train a prefix on the shipped data and compare it with the untouched model (2 cores: under 6 minutes)
	$(BIN)/foreword demo

test: $(STAMP) ## the offline test suite (2 cores: under 10 minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' -q $(PYTEST_ARGS)

test-long: $(STAMP) ## everything, the slow tests too, with many more random examples
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n 2 -q $(PYTEST_ARGS)

test-oldest: ## the offline suite with the oldest torch and transformers, in an environment of its own
	@mkdir -p build
	@cat constraints.txt > build/pins.txt
	@for name in $$(sed -n 's/==.*//p' constraints-oldest.txt) nvidia- cuda- triton; do \
		sed -i.bak "/^$$name/d" build/pins.txt; done
	@cat build/pins.txt constraints-oldest.txt > build/constraints-oldest.new
	@cmp -s build/constraints-oldest.new build/constraints-oldest.txt \
		|| cp build/constraints-oldest.new build/constraints-oldest.txt
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=build/constraints-oldest.txt

check: $(STAMP) ## style, types, layers, generated documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/build_cli.py --check

fix: $(STAMP) ## mend style where it can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## write the generated documents anew
	$(BIN)/python docs/build_cli.py

bench: $(STAMP) ## training beside PEFT's prefix tuning, what gates cost, and serving
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/gates.py
	$(BIN)/python benchmarks/serve.py

clean: ## remove the environment, caches and builds
	rm -rf $(VENV) .venv-oldest .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache .grimp_cache dist build
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
