# make app | make test | make lint | make format | make test-gpu | make bench | make env
#
# PYTHON=python3.12      the interpreter that the environment is made with (3.11 or newer)
# PORT=5007              another port for the app
# ARGS="-k snapkv"       passed on to pytest, kvw bench
# WORKERS=4              test processes (each uses one torch thread)
# PIP_ARGS="..."         passed on to pip, e.g. another index for torch

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help env app test test-gpu lint format bench

help:
	@sed -n 's/^# //p' Makefile

env: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "KV Workbench needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[app,notebook,dev]"
	@touch $@

app: $(INSTALLED)
	$(BIN)/panel serve apps/ $(if $(PORT),--port $(PORT))

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/kvw bench $(ARGS)
