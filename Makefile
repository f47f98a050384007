# `make run` needs nothing but Python 3.11 or newer. Everything is kept in .venv, so the command
# afterwards is .venv/bin/synerdiff.

HOST ?= 127.0.0.1
PORT ?= 8000
TORCH ?= torch>=2.6,<2.14

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help run test check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(RUN_STAMP) ## Start everything and print the page's address (HOST=127.0.0.1 PORT=8000)
	@$(BIN)/synerdiff up --host "$(HOST)" --port "$(PORT)"

test: $(DEV_STAMP) ## Run the tests
	@$(BIN)/python -m pytest

check: $(DEV_STAMP) ## Lint, check formatting, types and the directions of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## Remove the environment and every cache
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@set -eu; \
	for python in python3.11 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Creating $(VENV) with $$($$python --version)"; \
	    $$python -m venv $(VENV) || { \
	      rm -rf $(VENV); \
	      echo "error: $$python can't create environments; install its venv module (python3.11-venv on Debian)" >&2; \
	      exit 1; }; \
	    exit 0; \
	  fi; \
	done; \
	echo "error: Python 3.11 or newer is needed, as python3.11 or python3 on the PATH" >&2; \
	exit 1

# torch first and on its own: it is by far the largest, and whoever wants a certain build says so
# with TORCH=... or has it installed already.
$(RUN_STAMP): pyproject.toml | $(VENV)/bin/python
	@echo "Installing PyTorch and SynerDiff into $(VENV); this takes a few minutes the first time"
	@$(PIP) "$(TORCH)"
	@$(PIP) -e .
	@touch $@

$(DEV_STAMP): pyproject.toml | $(VENV)/bin/python
	@echo "Installing what tests and checks need into $(VENV)"
	@$(PIP) "$(TORCH)"
	@$(PIP) -e ".[dev]"
	@touch $(RUN_STAMP) $@
