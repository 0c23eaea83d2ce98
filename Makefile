# `make demo` and `make test` do all their own set-up: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
DEMO ?= runs/demo

.PHONY: help demo test slow lint check docs clean

help:
	@echo "make demo   install, compare six methods on scikit-learn's digits, print the report's path"
	@echo "make test   install and run the tests        make slow   run the long ones too"
	@echo "make lint   ruff and mypy --strict           make check  lint and test"
	@echo "make docs   build the documentation into site/"

$(VENV)/.core: pyproject.toml constraints.txt
	@echo "installing into $(VENV) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@$(INSTALL) '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	@$(INSTALL) '.[docs]'
	@touch $@

demo: $(VENV)/.core
	@rm -rf $(DEMO)
	$(BIN)/consilience compare local fedavg fedprox scaffold fedadam centralised \
		--clients 20 --partition dirichlet:0.1 --participation 0.5 --rounds 30 --seeds 3 --out $(DEMO)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

slow: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site dist .mypy_cache .ruff_cache .pytest_cache
