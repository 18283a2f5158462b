# Every target makes what it needs first: `make quickstart` on a fresh clone is enough.
#
#   PYTHON=python3.12      another interpreter (3.11 or newer)
#   PIP_ARGS="..."         more options for pip, e.g. an index that serves CPU-only torch wheels
#   TEST_ARGS="..."        more options for pytest, e.g. TEST_ARGS="tests/data -x"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

is_new_enough := 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c $(is_new_enough) 2>/dev/null && echo $$python && break; done)
PIP_ARGS ?=
TEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check -c requirements/constraints.txt $(PIP_ARGS)
# Tests run on the CPU, also where there is a GPU: their tolerances and process counts are made for it.
TEST_ENV := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST := $(TEST_ENV) $(PY) -m pytest

DEPENDENCIES := $(VENV)/.dependencies
EXTENSION := $(VENV)/.extension
CSRC := $(shell find csrc -type f)

.PHONY: help setup quickstart corpus-demo scaling-demo test test-all lint bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(EXTENSION)  ## .venv with pinned dependencies and the built C++ extension

quickstart: setup  ## real text, tokenizer, pre-training on 2 processes, export: about ten minutes
	$(PY) tools/quickstart.py

corpus-demo: setup  ## a real Chinese and English corpus through the whole pipeline, with report
	$(PY) tools/corpus_demo.py

scaling-demo: setup  ## a ladder of small models, its scaling law, and the largest predicted before it is trained
	$(PY) tools/scaling_demo.py

test: setup  ## all tests except the slow ones
	$(PYTEST) -m "not slow" $(TEST_ARGS)

test-all: setup  ## all tests
	$(PYTEST) $(TEST_ARGS)

lint: setup  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: setup  ## the tables of docs/benchmarks.md
	@missed=; for script in tools/bench/*.py; do echo "== $$script"; $(PY) "$$script" || missed="$$missed $$script"; done; \
		[[ -z "$$missed" ]] || { echo "not measured, for the reasons above:$$missed" >&2; exit 1; }

clean:  ## remove what setup and the tools have built
	rm -rf $(VENV) build *.egg-info megatron_b2/*.so megatron_b2/_cuda.txt .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(PY):
	@[[ -n "$(PYTHON)" ]] || { echo "error: no Python >= 3.11 with the venv module was found." \
		"Install one (Debian and Ubuntu: apt-get install python3 python3-venv python3-dev)," \
		"or name it: make setup PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c $(is_new_enough) || { echo "error: $(PYTHON) is older than 3.11 or has no venv module" >&2; exit 2; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

# DeepSpeed comes as source and its build imports torch, so torch is installed before it.
$(DEPENDENCIES): $(wildcard requirements/*.txt) | $(PY)
	@echo "installing pinned packages into $(VENV): torch (minutes, the first time)"
	@$(PIP) setuptools wheel packaging ninja pybind11 numpy torch
	@echo "installing pinned packages into $(VENV): all others"
	@$(PIP) --no-build-isolation -r requirements/runtime.txt -r requirements/corpus.txt -r requirements/deepspeed.txt -r requirements/triton.txt \
		-r requirements/dev.txt
	@touch $@

$(EXTENSION): setup.py pyproject.toml $(CSRC) $(DEPENDENCIES)
	@command -v c++ >/dev/null || { echo "error: no C++ compiler (c++) was found." \
		"Install one (Debian and Ubuntu: apt-get install g++)" >&2; exit 2; }
	@echo "building megatron_b2, its C++ extension and, where nvcc is found, its CUDA extension"
	@$(PIP) --no-build-isolation --no-deps -e .
	@[[ ! -f megatron_b2/_cuda.txt ]] || cat megatron_b2/_cuda.txt >&2
	@touch $@
