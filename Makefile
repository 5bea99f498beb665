# make demo, make test, make benchmark, make bench, make lint: each installs what it needs into .venv first, once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
LAYER_SUITES := decode,window_linear,fisher,observe,generate,loops
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test benchmark bench bench-check lint format clean

demo: $(VENV)/.demo
	$(BIN)/python -m ttt demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

# Under the options in bench/learning/tuned; runs that bench/learning/results holds are not made again.
benchmark: $(VENV)/.benchmark
	$(BIN)/python -m bench.learning --suite digits --jobs 2
	$(BIN)/python -m bench.learning --suite text --seeds 3 --curves --jobs 2
	$(BIN)/python -m bench.learning --report

# About 10 minutes on two cores.
bench: $(VENV)/.bench
	$(BIN)/python -m bench.kernels.run --suite commit --rounds 5 --seconds 2 --json bench/kernels/results/cpu_commit.json
	$(BIN)/python -m bench.kernels.run --suite $(LAYER_SUITES) --rounds 5 --seconds 3 --json bench/kernels/results/cpu_layers.json
	$(BIN)/python -m bench.kernels.run --suite growth --rounds 5 --seconds 4 --json bench/kernels/results/cpu_growth.json
	$(BIN)/python -m bench.kernels.run --suite head --rounds 5 --seconds 3 --json bench/kernels/results/cpu_head.json
	$(BIN)/python -m bench.kernels.run --suite low_rank --rounds 5 --seconds 3 --json bench/kernels/results/cpu_low_rank.json
	$(BIN)/python -m bench.kernels.plot
	$(BIN)/python -m bench.kernels.targets

# What a change of the kernels should not make worse, in a minute; compared with the committed results.
bench-check: $(VENV)/.bench
	$(BIN)/python -m bench.kernels.run --suite commit,decode --only 1024x1024 --rounds 5 --json bench.json
	$(BIN)/python -m bench.kernels.check bench.json

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

$(VENV)/.benchmark: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable '.[benchmark]'
	touch $@ $(VENV)/.demo

# BackPACK asks for torchvision, which nothing here uses, and which breaks transformers where its build does not fit
# torch's: it is installed without.
$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps 'backpack-for-pytorch>=1.6' unfoldNd
	touch $@ $(VENV)/.demo $(VENV)/.benchmark

# The packages that ttt is compared with: optional, and reported as "not installed" where they are missing.
$(VENV)/.bench: $(VENV)/.test
	$(PIP) --editable '.[bench]'
	touch $@

$(VENV)/.lint: pyproject.toml | $(BIN)/python
	$(PIP) ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info ttt/_C*.so ttt/_build.json
