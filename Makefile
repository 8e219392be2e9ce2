# `make demo` and `make test` set up all they need in .venv, from Python 3.11 to 3.13 and pip.
# README.md has the same steps for Windows, where there is no make.

PYTHON ?= python3
# Flags for the demo: make demo DEMO_FLAGS="--steps 20"
DEMO_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The tests run in somewhat more processes than there are cores (tests/conftest.py), each module within one of them.
# In one process, and readable with a debugger: make test PYTEST_ADDOPTS=
export PYTEST_ADDOPTS ?= --numprocesses=auto --dist=loadscope --no-loadscope-reorder

# What Python compiles is kept, also where the shell says otherwise (as images of containers often do): importing PyTorch and
# transformers takes two and a half times as long without, and the tests start many processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint install

install: $(INSTALLED)

# A module is compiled when it is first imported, and most of these never are.
$(INSTALLED): pyproject.toml constraints.txt
	@echo 'Installing PyTorch and the other packages into $(VENV); this can take some minutes.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/doge-lm demo $(DEMO_FLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest
