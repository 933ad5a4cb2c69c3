# `make` without a target lists all targets.

PYTHON ?= python3
TORCH ?= torch==2.13.0
HOST ?= 127.0.0.1
PORT ?= 5000
FUZZ_SECONDS ?= 600
SOAK_SECONDS ?= 3600
GPU_CHECK ?= --full

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
# dashscope is here for one data file of Qwen's tokenizers, never imported: it needs nothing else.
DATA_ONLY := dashscope==2.0.2
# Tools for one target each, installed by that target.
FUZZER := atheris==3.0.0
AUDITOR := pip-audit==2.10.1
# Ray, for `make fleet` alone. It also sees the packages of $(VENV), so that PyTorch is there once.
FLEET := .venv-fleet
# Which torch was installed: another TORCH installs again.
READY := $(VENV)/ready-$(subst =,-,$(firstword $(TORCH)))

# Waiting threads sleep instead of spinning: several times faster on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint bench gpu-check fuzz soak audit serve serve-train studio fleet clean

help: ## List the targets
	@echo "make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Settings: PYTHON=$(PYTHON) TORCH=$(TORCH) HOST=$(HOST) PORT=$(PORT) FUZZ_SECONDS=$(FUZZ_SECONDS) SOAK_SECONDS=$(SOAK_SECONDS)"

demo: setup ## Train on 16 small images, generate before and after: outputs/demo.png
	@$(BIN)/python -m demo

# Each test file runs in one process with one thread.
test: lint ## Check style and types, then run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Also the tests marked `slow`: they compile, kill processes and fill disks.
test-all: lint ## Run all tests, also the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" -n auto --maxprocesses 4 --dist loadfile

lint: setup ## Check style and types only
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy --no-error-summary

fuzz: setup ## Fuzz all parsers, FUZZ_SECONDS each
	@$(PIP) $(FUZZER)
	$(BIN)/python -m lab.fuzz --seconds $(FUZZ_SECONDS)

soak: setup ## Kill runs and resume them, and send requests to a Cog server for SOAK_SECONDS
	@$(BIN)/python -m lab.benchmarks.kill
	@$(BIN)/python -m lab.benchmarks.soak
	@$(BIN)/python -m lab.benchmarks.server_soak --seconds $(SOAK_SECONDS)

# In a separate environment, so that its own packages are not audited.
audit: setup ## Check pinned and installed packages for known vulnerabilities
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && \
	  $(VENV)/audit/bin/python -m pip install -q --disable-pip-version-check $(AUDITOR); }
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.txt
	$(VENV)/audit/bin/pip-audit --strict --path $(VENV)/lib/python3*/site-packages

bench: setup ## Measure a training step, a whole run, a change of LoRA; on a GPU if there is one
	@$(BIN)/python -m lab.benchmarks

gpu-check: setup ## Run the checks that need a GPU (GPU_CHECK=--quick: 4 minutes); writes gpu_check.json
	@$(BIN)/python -m lab.benchmarks.gpu_check $(GPU_CHECK)

serve: setup ## Serve predictions over HTTP, like the Cog image
	@$(BIN)/python -m serving predict --host $(HOST) --port $(PORT)

serve-train: setup ## Serve training over HTTP, like the Cog image
	@$(BIN)/python -m serving train --host $(HOST) --port $(PORT)

# At $(PORT) only where it is given.
studio: setup ## Open the web page to prepare images, train, watch and generate
	@$(BIN)/python -m studio $(if $(filter-out file,$(origin PORT)),--port $(PORT))

fleet: $(FLEET)/ready ## Serve predictions and trainings from several engines, with Ray Serve
	@$(FLEET)/bin/python -m fleet --base-model miniature-turbo --replicas 2 --cpus 2 \
	  --runs file://$(CURDIR)/outputs/fleet --host $(HOST) --port $(PORT)

setup: $(READY) ## Create .venv with all packages, if it is not there

clean: ## Remove .venv and caches; outputs and downloaded models stay
	rm -rf $(VENV) $(FLEET) .cog .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The pins of requirements.txt without its torch, which is the container's. torch goes first and is
# named again with the rest, so that no other package can pull in another build of it.
$(READY): requirements.txt requirements-dev.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is not one." \
	    "Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@rm -f $(VENV)/ready-*
	@echo "installing $(TORCH)"
	@$(PIP) $(TORCH)
	@echo "installing the rest of requirements.txt and requirements-dev.txt"
	@grep -v '^torch==' requirements.txt > $(VENV)/pins.txt
	@$(PIP) $(TORCH) -r $(VENV)/pins.txt -r requirements-dev.txt
	@$(PIP) --no-deps $(DATA_ONLY)
	@touch $@

$(FLEET)/ready: $(READY) requirements-fleet.txt
	@test -x $(FLEET)/bin/python || { echo "making $(FLEET)"; $(BIN)/python -m venv $(FLEET); }
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(FLEET)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	@echo "installing requirements-fleet.txt"
	@$(FLEET)/bin/python -m pip install -q --disable-pip-version-check --no-warn-conflicts \
	  -r requirements-fleet.txt
	@touch $@
