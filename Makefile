# SPDX-License-Identifier: Apache-2.0
# The commands of the README. Everything installs into .venv; nothing outside is touched.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt
RUN ?= runs/demo
MINUTES ?= 1000
export UV_LINK_MODE ?= copy

.PHONY: help demo check format test test-full docs evidence evidence-smoke clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

.venv/base: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check uv
	@echo "Installing into .venv (the download is large the first time) ..."
	@$(UV) --editable '.[export]'
	@touch $@

.venv/dev: .venv/base
	@$(UV) --editable . --group dev
	@touch $@

demo: .venv/base  ## train once, hold a family of models, ship a smaller one (about 3 minutes)
	@$(BIN)/dessilbi demo --out $(RUN)

check: .venv/dev  ## format, lint, types, import order
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q -p no:cacheprovider tests/test_layers.py

format: .venv/dev  ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: .venv/dev  ## everything a user's machine can run
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not full"

test-full: .venv/dev  ## test, the long checks, and the library on the oldest torch allowed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
	PYTHON=$(PYTHON) sh tests/oldest_torch.sh .venv-oldest

evidence: .venv/dev  ## measure what is missing of docs/evidence.md (hours; DESSILBI_DATA, MINUTES)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.evidence.run --workers 2 --minutes $(MINUTES)
	$(BIN)/python -m benchmarks.evidence.page

evidence-smoke: .venv/dev  ## the whole chain of it at a tiny size
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/evidence

docs: .venv/dev  ## build the documents as a web site into site/
	$(BIN)/python docs/making/site.py

clean:  ## remove the virtual environment and caches
	rm -rf .venv .venv-oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build site
