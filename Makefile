SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Tests compute with one thread each, so a process for each core makes the best use of the cores.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: demo test test-all bench lint format install baselines clean

# Trains MAGIC-Flow on simulated scanners on real anatomy, classifies held-out scans, writes demo/report.html.
demo: $(INSTALLED)
	$(BIN)/fastflow demo --out demo

test: $(INSTALLED)
	$(PYTEST) -m "not slow and not browser"

test-all: $(INSTALLED)
	$(PYTEST)

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench --benchmark-only

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

# Networks of timm have an environment of their own, since torchvision breaks what imports it beside a CPU build
# of torch.
baselines: .venv-baselines/.installed

.venv-baselines/.installed: setup.py constraints.txt constraints-baselines.txt
	$(PYTHON) -m venv .venv-baselines
	.venv-baselines/bin/python -m pip install --disable-pip-version-check -c constraints.txt \
	  -c constraints-baselines.txt -e ".[baselines]" pytest hypothesis pytest-xdist
	touch $@

clean:
	rm -rf .venv .venv-baselines build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage
	find fastflow export tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an interrupted installation is repeated.
$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fastflow needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot create virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
