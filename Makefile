# make demo       the bundled model solves held-out word problems, reasoning on and off
# make test       the test suite
# make quality    ruff, mypy and the contract of who may import what
# make format     ruff, rewriting
# make bench      the benchmarks, about ten minutes; results in benchmarks/results
#
# One rule for the environment: everything runs with $(PY), which is .venv/bin/python unless you say otherwise. .venv
# is made on first use from $(PYTHON), with the pinned versions of $(CONSTRAINTS). To use an environment of your own
# (it must have `pip install -e '.[dev]'`), name its interpreter: make test PY=python

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev
PY ?= $(VENV)/bin/python
# Test processes, one torch thread each: torch's own threads would only fight each other.
JOBS ?= 2
PYTEST_ARGS ?=
# Each has a time budget of its own, ten minutes in all; BENCH_ARGS=--full measures everything whole, for hours.
BENCHMARKS ?= loading convert tiny_decode moe mamba_layer decode long_prefill prefill modelopt training snapshots speculation
BENCH_ARGS ?=
# Put the library's own tests, and the CUDA packages' own functions, where tests/library and tests/kernels look; without
# the package index they are skipped, which pytest says.
FETCH ?= tests/library/fetch.py tests/kernels/fetch_packages.py

STAMP := $(VENV)/.installed
ifeq ($(PY),$(VENV)/bin/python)
ENV := $(STAMP)
else
ENV :=
endif

.PHONY: help demo test quality format bench clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^# make/s/^# //p' Makefile

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10; name a newer one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) -V) and the versions of $(CONSTRAINTS) (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]' -c $(CONSTRAINTS)
	@touch $@

demo: $(ENV)
	$(PY) -m nemotron_h demo

test: $(ENV)
	-@for script in $(FETCH); do $(PY) $$script; done
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	  $(PY) -m pytest -n $(JOBS) $(PYTEST_ARGS)

quality: $(ENV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c "from importlinter.cli import lint_imports_command as lint; lint()" --no-cache

format: $(ENV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(ENV)
	@$(PY) -c 'import matplotlib' 2>/dev/null || echo "no plots: make bench EXTRAS=dev,bench in a new .venv, or pip install matplotlib"
	@for name in $(BENCHMARKS); do \
	  echo "== $$name"; TRANSFORMERS_VERBOSITY=error $(PY) benchmarks/$$name.py $(BENCH_ARGS) || exit 1; \
	done

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
