# make env    set up .venv (torch, mmcv, mmdet, the compiled operator); the others do it first if needed
# make demo   train and evaluate a small SoftPool detector on data it draws itself, in under 10 minutes
# make test   lint and test
# make format rewrite the sources in the project's style

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# `python -m` keeps working when the checkout, and with it .venv, is moved.
PY     := $(BIN)/python
CSRC   := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: env demo test lint format clean
.DELETE_ON_ERROR:

env: $(VENV)/.built

$(VENV)/.installed: constraints.txt pyproject.toml tools/setup_env.sh
	PYTHON=$(PYTHON) tools/setup_env.sh $(VENV)
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(CSRC)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@
