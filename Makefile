# Everything happens in .venv, made with the interpreter that PYTHON names.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ADAPTERS := sentiment json-contact sql pirate

.DELETE_ON_ERROR:
.PHONY: demo test test-slow soak check bench clean

demo: $(VENV)/.runtime
	$(BIN)/polybatch batch -i examples/mixed.jsonl -o demo-output.jsonl --overwrite \
		--model smollm2-135m-instruct $(foreach name,$(DEMO_ADAPTERS),--adapter $(name)=examples/adapters/$(name))
	$(BIN)/python examples/show_demo.py examples/mixed.jsonl demo-output.jsonl

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev
	POLYBATCH_SOAK_S=$${POLYBATCH_SOAK_S:-300} $(BIN)/python -m pytest -m slow

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow tests/server/test_soak.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.runtime
	$(BIN)/polybatch bench

clean:
	rm -rf $(VENV) demo-output.jsonl demo-output.jsonl.journal.sqlite*

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Polybatch needs Python 3.11 or newer: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

INSTALL = $(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt

# A stamp per set of packages, so that the second run installs nothing.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Polybatch and what it needs into $(VENV): minutes, but only this once"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Polybatch and what working on it needs into $(VENV): minutes, but only this once"
	@$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.runtime $@
