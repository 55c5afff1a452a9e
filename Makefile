# What one types while working on this. PYTHON=... takes another environment than .venv.
PYTHON ?= .venv/bin/python
.PHONY: help install test slow lint format types docs coverage check clean

help: ## Show these verbs
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

install: ## Make .venv with everything that development needs
	python3 -m venv .venv && .venv/bin/pip install -q -e ".[dev]"

test: ## Run the quick tests
	$(PYTHON) -m pytest

slow: ## Run the slow tests
	$(PYTHON) -m pytest -m slow --dist worksteal --durations=5

lint: ## Say what ruff finds, change nothing
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

format: ## Let ruff repair and format
	$(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .

types: ## Check the types
	$(PYTHON) -m mypy

docs: ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

coverage: ## Say which lines no quick test reaches
	$(PYTHON) -m coverage run -m pytest -n 0 && $(PYTHON) -m coverage combine -q && $(PYTHON) -m coverage report

check: lint types docs test ## Run all of these that are quick: before a commit

clean: ## Delete what these verbs leave, but .venv and runs/
	rm -rf site build dist .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache
