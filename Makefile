# Every target does its own set-up: a virtual environment in .venv, installed from constraints.txt.
# Needs Python 3.10 or newer; PYTHON=python3.11 chooses one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= demo_results

.DEFAULT_GOAL := help
.PHONY: help install demo benchmarks test lint docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

install: $(READY) ## set up .venv with the package and everything its development needs

demo: $(READY) ## train on digits with flipped labels, find them, write a page to demo_results/
	$(BIN)/trak-dropout demo --out $(OUT)

benchmarks: $(READY) ## run every study of docs/evidence.md at its small setting (under an hour on two cores)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,benchmarks]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps -r benchmarks/peers.txt
	$(BIN)/python benchmarks/run_all.py

test: $(READY) ## run the tests
	$(BIN)/python -m pytest

lint: $(READY) ## check style, docstrings and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY) ## build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

clean: ## remove everything that the targets make
	rm -rf $(VENV) $(OUT) build docs/_build *.egg-info .hypothesis .mypy_cache .ruff_cache
