# The two commands of a newcomer are `make train` and `make test`; `make check` is what CI runs.
PYTHON ?= python3
# Another environment for another Python: make test VENV=.venv-newest PYTHON=/path/to/python3.13
VENV ?= .venv
WORKDIR ?= runs/debug
BIN := $(VENV)/bin
# LOWEST=1 installs of everything the oldest series that pyproject.toml allows.
LOWEST ?=
# The jax for this machine: the CUDA of its NVIDIA driver, a TPU, or neither.
EXTRA := $(shell cuda=$$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p'); \
	if [ -n "$$cuda" ]; then [ "$$cuda" -ge 13 ] && echo ,cuda || echo ,cuda12; \
	elif ls /dev/accel* /dev/vfio/[0-9]* 2>/dev/null | grep -q .; then echo ,tpu; fi)

.PHONY: train test test-quick test-aot test-hf plans invariance check format lint types setup clean

train: setup
	$(BIN)/tvq train --config=configs/debug.py --workdir=$(WORKDIR)

test: setup
	$(BIN)/pytest -n auto -q

test-quick: setup
	$(BIN)/pytest -n auto -q -m "not slow"

# The debug model on shapes of the mesh: sixteen against one device, five bit by bit; about ten minutes.
invariance: setup
	$(BIN)/python -m tests.mesh_invariance

# Costs of programs compiled for an H200 and a TPU that are not there. The compilers take 5 GB.
test-aot: .venv-aot/ready
	JAX_PLATFORMS=cpu XLA_FLAGS= .venv-aot/bin/pytest -q -s tests/aot

# Exported models in transformers, where there is neither jax nor tvq. PyTorch takes 6 GB.
test-hf: setup .venv-hf/ready
	rm -rf .cache/hf
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.hf.cases .cache/hf/cases
	HF_HUB_OFFLINE=1 HF_HOME=.cache/hf/home TVQ_HF_CASES=.cache/hf/cases OMP_NUM_THREADS=1 \
		.venv-hf/bin/pytest -q -s --noconftest -c /dev/null --rootdir=. -p no:cacheprovider tests/hf/test_modeling.py

.venv-hf/ready: pyproject.toml
	$(PYTHON) -m venv .venv-hf
	sed -nE 's/^hf = \[(.*)\].*/\1 pytest numpy/p' pyproject.toml | tr -d '",' | \
		xargs .venv-hf/bin/pip install --quiet --disable-pip-version-check
	touch $@

# What docs/plan.md tabulates, a file a line; hours on two cores.
plans: .venv-aot/ready
	mkdir -p runs/plans
	while read -r name options; do \
		.venv-aot/bin/tvq plan $$options > runs/plans/$$name.txt; done < docs/plans.txt

.venv-aot/ready: pyproject.toml
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/pip install --quiet --disable-pip-version-check --editable '.[dev,cuda,tpu]'
	touch $@

check: setup lint types test

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tvq needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(if $(LOWEST),sed -nE 's/^ *"([A-Za-z-]+)>=([0-9.]+)".*/\1==\2.*/p' pyproject.toml) > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt --editable '.[dev$(EXTRA)]'
	touch $@

clean:
	rm -rf .venv .venv-newest .venv-aot .venv-hf .cache
