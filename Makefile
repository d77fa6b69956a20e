# The two commands of a newcomer are `make train` and `make test`; `make check` is what CI runs.
PYTHON ?= python3
WORKDIR ?= runs/debug
BIN := .venv/bin
# The jax for this machine: an NVIDIA driver, a TPU, or neither.
EXTRA := $(shell if nvidia-smi -L >/dev/null 2>&1; then echo ,cuda; \
	elif ls /dev/accel0 /dev/vfio/0 >/dev/null 2>&1; then echo ,tpu; fi)

.PHONY: train test test-quick check format lint types setup clean

train: setup
	$(BIN)/tvq train --config=configs/debug.py --workdir=$(WORKDIR)

test: setup
	$(BIN)/pytest -n 2 -q

test-quick: setup
	$(BIN)/pytest -n 2 -q -m "not slow"

check: setup lint types test

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

setup: .venv/ready

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tvq needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev$(EXTRA)]'
	touch $@

clean:
	rm -rf .venv .cache
