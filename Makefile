# thermograd: `make demo` and `make test` work on a fresh machine with Python >= 3.11 and nothing else.
#
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu    a small torch without CUDA
#   make demo PYTHON=python3.12                                   another interpreter

PYTHON      ?= python3
TORCH_INDEX ?=
VENV        ?= .venv
RUN         ?= runs/demo
WORKERS     ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo install test lint types doctest suite bench clean

help: ## this list
	@echo "make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON)  TORCH_INDEX=$(TORCH_INDEX) (pip index for torch; empty: pip's own)  VENV=$(VENV)"

demo: $(VENV)/.installed ## train a network on handwritten digits, check every law, write a report
	@$(BIN)/thermograd demo --out $(RUN)

install: $(VENV)/.installed ## create the environment and install thermograd into it

test: lint types doctest suite ## lint, type check, doctests and the test suite
	@echo "All checks passed."

lint: $(VENV)/.test-installed
	@echo "== ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Run '$(BIN)/ruff format .' to format these files:"; \
		$(BIN)/ruff format --check .; exit 1; }

types: $(VENV)/.test-installed
	@echo "== mypy"
	@$(BIN)/mypy --no-error-summary

doctest: $(VENV)/.test-installed
	@echo "== doctests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --doctest-modules src

suite: $(VENV)/.test-installed
	@echo "== tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests

bench: $(VENV)/.test-installed ## time what matters (benchmarks/)
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean: ## remove the environment, caches and builds; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamp files say what is done, so that a second call starts at once; they are touched only after success.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
		echo "There is no '$(PYTHON)' here. thermograd needs Python 3.11 or newer: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version 2>&1). thermograd needs Python 3.11 or newer: make PYTHON=python3.12"; \
		exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
		echo "Creating $(VENV) failed. On Debian or Ubuntu: apt install python3-venv, then 'make clean' and again."; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created constraints.txt pyproject.toml
	@echo "Installing torch (the largest download; TORCH_INDEX chooses where from)"
	@$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@echo "Installing thermograd and what it needs"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	@echo "Installing the test tools"
	@$(PIP) --editable '.[test]'
	@touch $@
