# make setup        a virtual environment in .venv with everything pinned (GPU=1: the CUDA set)
# make quickstart   start the service, train the smallest job through it on two CPU cores, stop it
# make test         set up and run the tests; make test-fast: only those without real engines; make test-long: runs of minutes
# make chaos        kill parts of real runs at random: SEEDS="1 2", MINUTES=10 each, FAULTS="rollout=5 driver=1"
# make check        format, lint, types and layers, as every commit should pass; make format: apply the format
# make docs         write docs/jobs.md and docs/api.md again from what they describe
# make chart        write the chart's table of values and the plain manifests again
# make clean        remove .venv and caches

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# A .venv that holds the GPU set goes on with it.
GPU ?= $(if $(wildcard .venv/.locked-gpu),1)
SET := $(if $(GPU),gpu,cpu)
OTHER := $(if $(GPU),cpu,gpu)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile --no-deps

# The public home of torch's CPU builds. Where it cannot be reached, pip goes on with the index it has.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH := $(shell grep '^torch==' requirements/$(SET).lock)

PATHS := sapo_ray tests scripts $(wildcard benchmarks examples)

SEEDS ?= 1
MINUTES ?= 10

.PHONY: help setup quickstart test test-fast test-long chaos check format docs chart clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

setup: $(VENV)/.project

# The project itself, editable; again whenever its metadata changes.
$(VENV)/.project: $(VENV)/.locked-$(SET) pyproject.toml
	$(PIP) --no-build-isolation --editable .
	@touch $@

# Everything else, exactly as locked. torch first and by itself: deepspeed builds against it.
$(VENV)/.locked-$(SET): requirements/$(SET).lock
	@$(PYTHON) scripts/check_machine.py
	@if [ -e $(VENV)/.locked-$(OTHER) ]; then echo "$(VENV) holds the $(OTHER) set; run 'make clean' first" >&2; exit 1; fi
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@$(PIP) $(TORCH) $(if $(GPU),,--retries 1 --extra-index-url $(TORCH_CPU_INDEX))
	@echo "installing requirements/$(SET).lock"
	@grep -v -E '^(#|torch==|deepspeed==)' $< > $(VENV)/rest.txt
	@$(PIP) --requirement $(VENV)/rest.txt
	@$(PIP) --no-build-isolation $$(grep '^deepspeed==' $<)
	@$(BIN)/python scripts/check_torch.py $(SET)
	@echo "compiling bytecode"
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > $(VENV)/compileall.log 2>&1 || true  # templates among the files do not compile
	@touch $@

quickstart: setup
	$(BIN)/sapo-ray quickstart configs/quickstart.yaml

# Two processes: one for all that has real engines, one for the rest.
test: setup
	$(BIN)/python -m pytest -m "not long" -n 2 --no-loadscope-reorder

test-long: setup
	$(BIN)/python -m pytest -m long

test-fast: setup
	$(BIN)/python -m pytest tests/unit -m "not integration and not slow and not gpu"

chaos: setup
	PYTHONPATH=tests:tests/integration $(BIN)/python tests/chaos/long.py --seeds $(SEEDS) --minutes $(MINUTES) $(if $(FAULTS),--faults $(FAULTS))

check: setup
	$(BIN)/ruff format --check $(PATHS)
	$(BIN)/ruff check $(PATHS)
	$(BIN)/mypy --strict sapo_ray
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format $(PATHS)
	$(BIN)/ruff check --fix $(PATHS)

chart: setup
	$(BIN)/python scripts/chart_pages.py

docs: setup
	$(BIN)/python -m sapo_ray.config.reference > docs/jobs.md
	$(BIN)/python -m sapo_ray.control.reference > docs/api.md
	$(BIN)/python -m sapo_ray.control.settings_reference > docs/settings.md

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist *.egg-info
