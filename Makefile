# kitae: two commands do all the set-up on a machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: quickstart test check lint types install install-dev bench docs clean help

help:
	@echo "make quickstart   install, then teach a small model to reason: one to three minutes on 2 CPU cores"
	@echo "make test         install and run the whole test suite"
	@echo "make check        lint, types and tests"
	@echo "make docs         write anew the pages of docs/ that are generated"
	@echo "make bench        measure against other tools on this machine (installs them and builds llama.cpp): about an hour"
	@echo "                  on 2 CPU cores; BENCH='--only sft grpo' measures a part"

quickstart: install
	$(BIN)/kitae quickstart

test: install-dev
	$(BIN)/python -m pytest

check: lint types test

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

bench: install-dev
	$(PIP) install -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/run_all.py $(BENCH)

docs: install-dev
	$(BIN)/python -m kitae.cli._pages docs
	$(BIN)/python tests/methods/make_page.py

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kitae needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) lacks the venv module. On Debian or Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact pin: a bare "torch" or a range can pull several GB of another build.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "installing $(TORCH) (once; with CUDA several GB)"
	$(BIN)/python -m pip --disable-pip-version-check install "$(TORCH)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) install -c constraints.txt -e ".[plots]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e ".[plots,dev,parity]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
