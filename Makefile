# One file of commands for people and for CI. `make help` lists them.

PYTHON ?= python3
# cpu or gpu: which ONNX Runtime wheel serving takes (they exclude each other).
RUNTIME ?= cpu

VENV := .venv
BIN := $(VENV)/bin
PORT := $(or $(TARE_PORT),8000)

.DEFAULT_GOAL := help
.PHONY: help serve test check lint fast-tests-training fast-tests-others bench-training bench-serving bench-gpu format clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.serving-$(RUNTIME) ## install what serving needs and serve the bundles in models/
	@echo 'API docs:  http://127.0.0.1:$(PORT)/docs'
	@echo 'Try this:  curl --data-binary @docs/example.png "http://127.0.0.1:$(PORT)/predict?tau=1.5&top_k=3"'
	@exec $(BIN)/python -m service

test: $(VENV)/.everything ## install everything and run the whole test suite
	$(BIN)/python -m pytest

check: $(VENV)/.everything ## lint, types, import arrows and the fast tests, side by side
	@$(MAKE) --no-print-directory -j 3 --output-sync lint fast-tests-training fast-tests-others

lint: $(VENV)/.everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fast-tests-training: $(VENV)/.everything
	$(BIN)/python -m pytest -q -m 'not slow' tests/training

fast-tests-others: $(VENV)/.everything
	$(BIN)/python -m pytest -q -m 'not slow' --ignore tests/training

bench-training: $(VENV)/.everything ## time our training step beside the loop most people write
	$(BIN)/python -m bench.training

bench-serving: $(VENV)/.everything ## load the service beside the bare limit and other servers (needs wrk)
	$(BIN)/python -m bench.serving

bench-gpu: $(VENV)/.everything ## the same on a GPU; without one it says so
	$(BIN)/python -m bench.gpu

format: $(VENV)/.everything ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo 'make: $(PYTHON) is missing; install Python 3.11 or newer, or name one: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'make: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo 'make: $(PYTHON) has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps stand for a finished installation, so that an interrupted one is taken up again.
$(VENV)/.serving-$(RUNTIME): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(RUNTIME)]'
	@touch $@

$(VENV)/.everything: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(RUNTIME),training,dev]'
	@touch $@ $(VENV)/.serving-$(RUNTIME)
