# make demo   sets everything up, then quantize → train → merge → export → verify-parity on the sample
# make test   sets everything up, then runs the test suite
# make fuzz   lets 100,000 damaged files loose on every reader; an hour or two
# make lint   ruff and mypy
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= build/demo
CASES ?= 100000
SEED ?= 0

.PHONY: demo test fuzz lint setup seeds clean

demo: $(VENV)/.installed
	$(BIN)/qalora-export run samples/devices/recipe.toml --out $(OUT)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2

fuzz: $(VENV)/.installed-dev
	nice $(BIN)/python -m tests.survival.fuzz --cases $(CASES) --seed $(SEED)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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

clean:
	rm -rf $(VENV) build
