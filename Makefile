# `make` alone prints the targets. PYTHON chooses the interpreter that .venv is made with; ARGS goes
# to pytest (`make test-fast ARGS='-k packing'`); TORCH_INDEX, if set, is where torch comes from:
# on a machine without a GPU, PyTorch's index of CPU builds saves a download of gigabytes.
PYTHON ?= python3
ARGS ?=
TORCH_INDEX ?=

VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

# DeepSpeed runs `ninja` from PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Ray's token is for clusters: see cluster.yaml.
export RAY_AUTH_MODE := disabled
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-slow check dist clean distclean toolchain

help:  ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: $(STAMP)  ## train, serve and score a tiny reward model on this machine
	python jobs/quickstart.py

test test-fast test-slow: export HF_HUB_OFFLINE := 1

# Tests that start Ray run alone, one by one; the others in two processes, file by file. ARGS may
# leave none of a kind, which is pytest's exit code 5.
RAY := python -m pytest
OTHERS := python -m pytest -n 2 --dist loadfile

test: check  ## what a change must pass: check, then all tests but the slow
	$(RAY) -m "ray and not slow" $(ARGS) || test $$? = 5
	$(OTHERS) -m "not ray and not slow" $(ARGS) || test $$? = 5

test-fast: $(STAMP)  ## the tests that neither start Ray nor train, in about a minute
	$(OTHERS) -m "not ray and not trains and not slow" $(ARGS)

test-slow: $(STAMP)  ## the exhaustive rest
	$(RAY) -m "ray and slow" $(ARGS) || test $$? = 5
	$(OTHERS) -m "slow and not ray" $(ARGS) || test $$? = 5

check: $(STAMP)  ## format, lint and types
	ruff format --check .
	ruff check .
	mypy

dist: $(STAMP)  ## the wheel, and the versions it goes with: what cluster.yaml installs
	rm -rf dist
	$(PIP) wheel --no-deps --wheel-dir dist .
	cp constraints.txt dist/

clean:  ## remove what was built or written here, but not .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf demo-output reward-output
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

# torch goes first and alone: constraints.txt pins it, and a looser first choice would pull another
# version with its gigabytes of CUDA, only to be replaced.
$(STAMP): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory toolchain
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || { \
	  echo "make: no virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  rm -rf $(VENV); exit 1; }
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

toolchain:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "make: raywards needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@command -v g++ >/dev/null || { \
	  echo "make: no g++ on PATH, and DeepSpeed compiles its communication kernels with it;" \
	    "on Debian and Ubuntu: apt install g++" >&2; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
	  || { echo "make: $(PYTHON) has no Python.h, which DeepSpeed compiles against;" \
	    "on Debian and Ubuntu: apt install python3-dev" >&2; exit 1; }
