# Everything a developer types. `make` alone lists it. CI runs these same targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
READY := .venv/.installed

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1mmake %-9s\033[0m %s\n", $$1, $$2 }' Makefile

install: $(READY) ## Make .venv from requirements.lock (Python 3.11 or 3.12; nothing else is needed)

# A second run does nothing until the lock, the project file or the installer changes.
$(READY): requirements.lock pyproject.toml deploy/requirements/install.sh
	@deploy/requirements/install.sh .venv
	@touch $@

demo: $(READY) ## Start everything, ask about a drawn page, a drawn clip and a real video, stop everything
	@$(BIN)/nvila demo

test: $(READY) ## Run every test: quick ones first, then the whole path on the real programs
	@deploy/charts/helm.sh $(BIN)/python >/dev/null
	@deploy/browser/chromium.sh $(BIN)/python >/dev/null
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(ARGS)

check: $(READY) ## Check formatting, lint, types and the direction of imports
	@$(BIN)/ruff format --check services tests benchmarks
	@$(BIN)/ruff check services tests benchmarks
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## Format the code and sort its imports
	@$(BIN)/ruff format services tests benchmarks
	@$(BIN)/ruff check --fix services tests benchmarks

charts: $(READY) ## Remake the chart's README and schema from its values; lint, render, validate and test it
	@$(BIN)/python deploy/charts/document.py
	@deploy/charts/helm.sh $(BIN)/python
	@$(BIN)/python -m pytest -q tests/charts $(ARGS)

protos: $(READY) ## Generate services/nvila/{api,internal}/v1 from protos/
	@$(BIN)/python -m grpc_tools.protoc -I protos --python_out=services --pyi_out=services --grpc_python_out=services \
	  $$(cd protos && find nvila -name '*.proto' | sort)

lock: ## Resolve deploy/requirements/all.in into requirements.lock (needs uv)
	@deploy/requirements/lock.sh

up: $(READY) ## Start a stack in the background: make up ARGS="--model FOLDER"
	@$(BIN)/nvila up --detach $(ARGS)

down: $(READY) ## Stop it
	@$(BIN)/nvila down $(ARGS)

bench: $(READY) ## Time the path for 256 frames on this machine
	@$(BIN)/python -m benchmarks.path $(ARGS)

golden: $(READY) ## Compare the model with saved reference outputs: make golden GOLDEN=FOLDER
	@test -n "$(GOLDEN)" || { echo "say where they are: make golden GOLDEN=FOLDER" >&2; exit 2; }
	@$(BIN)/python -m nvila.golden $(GOLDEN) --checkpoints tests/data/golden/e2e

clean: ## Remove what was made here: .venv, caches, stopped stacks
	@test ! -x $(BIN)/nvila || $(BIN)/nvila down --all --quiet || true
	@rm -rf .venv .nvila .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install demo test check format charts protos lock up down bench golden clean
