# Every target builds what it needs from a bare Python: `make test PYTHON=python3.12` has its own
# environment, `PARITY=1` adds PyTorch for the parity tests, `ARGS=...` is passed on.
PYTHON ?= python3
VENV := $(if $(filter-out python3,$(PYTHON)),.venv-$(notdir $(PYTHON)),.venv)
BIN := $(VENV)/bin
# A file's tests run in one worker: its fixtures, most of them whole runs, are made once. A worker that
# dies ends the session and is named; xdist may wait for ever for tests of the one that replaces it.
WORKERS := -n 2 --dist loadfile --max-worker-restart 0
PIP := $(BIN)/python -m pip install -q

# A stamp is touched after its install has ended, so an interrupted one leaves none.
CREATED := $(VENV)/.created
RUNTIME := $(VENV)/.installed
TEST := $(VENV)/.installed-test
DEV := $(VENV)/.installed-dev
AOT := $(VENV)-aot/.installed-aot
AXE := $(VENV)/axe/node_modules/axe-core/axe.min.js
PARITY_STAMP := $(if $(filter-out 0,$(PARITY)),$(VENV)/.installed-parity)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two installs into one environment must not meet.
.NOTPARALLEL:
.PHONY: help quickstart quickstart_multi smoke test test-all test-gpu test-browser chromium schema lint format clean

help: ## List the targets
	@grep -E '^[a-z_-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 20

quickstart: $(RUNTIME) ## Distil a small model on this machine
	$(BIN)/fireopd train configs/quickstart.yaml $(ARGS)

quickstart_multi: $(RUNTIME) ## The same with two routed teachers
	$(BIN)/fireopd train configs/quickstart_multi.yaml $(ARGS)

smoke: $(RUNTIME) ## The smallest complete run: does everything work at all
	$(BIN)/fireopd train configs/smoke.yaml $(ARGS)

test: $(TEST) $(PARITY_STAMP) ## Run the tests, without the slow ones
	@$(BIN)/python -m pytest $(WORKERS) -m "not slow and not aot and not browser" $(ARGS)

test-all: $(TEST) $(PARITY_STAMP) $(AOT) $(AXE) chromium ## Run every test that needs no GPU, and compile for TPUs and GPUs
	@FIREOPD_AXE=$(CURDIR)/$(AXE) $(BIN)/python -m pytest $(WORKERS) -m "not aot" $(ARGS)
	@XLA_FLAGS=--xla_backend_optimization_level=3 \
	  $(VENV)-aot/bin/python -m pytest $(WORKERS) -m aot $(ARGS)

test-gpu: $(TEST) $(VENV)/.installed-cuda ## Run the tests that need a GPU
	@FIREOPD_TEST_GPU=1 $(BIN)/python -m pytest -m gpu $(ARGS)

test-browser: $(TEST) $(AXE) chromium ## Look at reports in Debian's Chromium, which it installs
	@FIREOPD_AXE=$(CURDIR)/$(AXE) $(BIN)/python -m pytest -m browser $(ARGS)

schema: $(RUNTIME) ## Write configs/schema.json anew, after a change of any setting
	$(BIN)/fireopd schema configs/schema.json

lint: $(DEV) ## Check style, format, types and layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(DEV) ## Format the code and mend what ruff can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## Remove the environments and what was built; never runs/
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -rf .import_linter_cache
	find fireopd_jax tests configs -name __pycache__ -type d -prune -exec rm -rf {} +

$(CREATED):
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(RUNTIME): pyproject.toml | $(CREATED)
	$(PIP) -e .
	@touch $@

# Apart from the others: with libtpu installed, every program without a TPU complains about it.
$(AOT): pyproject.toml
	$(PYTHON) -m venv $(VENV)-aot
	$(VENV)-aot/bin/python -m pip install -q -e ".[test,aot]"
	@touch $@

# By the package manager of Debian or Ubuntu; as another user than root by sudo.
chromium:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  run=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$run apt-get update -q && \
	  $$run apt-get install -qy --no-install-recommends chromium chromium-driver; }

$(AXE): $(VENV)/.installed-browser
	@PATH="$(CURDIR)/$(BIN):$$PATH" npm install --silent --no-save --prefix $(VENV)/axe axe-core@4

$(VENV)/.installed-%: pyproject.toml | $(CREATED)
	$(PIP) -e ".[$*]"
	@touch $@
