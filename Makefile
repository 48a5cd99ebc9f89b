# Everything a developer does. Needs python3.11, make and pip; the rest is installed into $(VENV).
PYTHON ?= python3.11
VENV ?= .venv
SHELL := /bin/bash
BIN := $(abspath $(VENV))/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGES := services tests

.DEFAULT_GOAL := help
.PHONY: help install models demo test check format lint types imports protos generate pytest verify bench bench-peers clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# torch by itself first: pip then finds it satisfied and takes nothing bigger along.
$(STAMPS)/torch: $(STAMPS)/venv
	$(PIP) install --quiet $$(grep '^torch==' constraints-dev.txt)
	touch $@

$(STAMPS)/install: $(STAMPS)/torch pyproject.toml constraints-dev.txt
	$(PIP) install --quiet -c constraints-dev.txt -e '.[dev]'
	touch $@

install: $(STAMPS)/install  ## Environment and dependencies

models: install  ## Fetch the small test model
	$(BIN)/specpool models fetch smollm2-135m-instruct

demo: install  ## Fetch a pair of real models, start everything, stream an answer, stop
	$(BIN)/specpool demo

test: check models pytest  ## Environment, every check, every test

check: lint types imports protos  ## Static checks

format: install  ## Format the code
	$(BIN)/ruff format $(PACKAGES)
	$(BIN)/ruff check --fix $(PACKAGES)

lint: install  ## ruff
	$(BIN)/ruff check $(PACKAGES)
	$(BIN)/ruff format --check $(PACKAGES)

types: install  ## mypy --strict
	$(BIN)/mypy

imports: install  ## Import contracts, no circles
	$(BIN)/lint-imports
	$(BIN)/python tests/tools/check_circles.py

protos: install  ## buf lint, breaking changes, drift of generated code
	PATH="$(BIN):$$PATH" tests/tools/check_protos.sh

generate: install  ## Regenerate the protobuf code
	PATH="$(BIN):$$PATH" PYTHON=$(BIN)/python proto/generate.sh

pytest: install  ## All tests
	PATH="$(BIN):$$PATH" $(BIN)/pytest $(PYTEST_ARGS)

verify: models  ## Every token of ssd and sd equals plain decoding: 50 prompts (long)
	$(BIN)/specpool models fetch smollm2-135m-instruct
	$(BIN)/python tests/bench/verify_lossless.py $(VERIFY_ARGS)

bench: install  ## off, sd and ssd on a real pair (long)
	$(BIN)/specpool models fetch qwen2.5-coder-0.5b-instruct qwen2.5-coder-1.5b-instruct
	$(BIN)/specpool bench --json bench-results/bench.json --plots bench-results $(BENCH_ARGS)

bench-peers: install  ## Ours beside transformers and llama.cpp, which is built here (long)
	$(PIP) install --quiet cmake ninja sentencepiece
	$(BIN)/specpool models fetch qwen2.5-coder-0.5b-instruct qwen2.5-coder-1.5b-instruct
	mkdir -p bench-results
	PATH="$(BIN):$$PATH" $(BIN)/python tests/bench/peers.py --up=--compile --up=true \
		--json bench-results/peers.json $(PEERS_ARGS)

clean:  ## Remove the environment
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
