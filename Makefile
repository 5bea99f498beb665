# make demo, make test, make bench, make lint: each installs what it needs into .venv first, once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test bench lint format clean

demo: $(VENV)/.demo
	$(BIN)/python -m ttt demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

bench: $(VENV)/.test
	$(BIN)/python -m bench.run --suite commit --rounds 5 --json bench/results/cpu_commit.json
	$(BIN)/python -m bench.run --suite decode,observe --rounds 5 --json bench/results/cpu_layers.json

lint: $(VENV)/.test $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: a range could resolve to a build with gigabytes of CUDA.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/.demo

$(VENV)/.lint: pyproject.toml | $(BIN)/python
	$(PIP) ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info ttt/_C*.so ttt/_build.json
