# Every target first installs what is missing. The two that matter: `make demo` and `make test`.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON := .venv/bin/python
UV := .venv/bin/uv
PYTEST := $(PYTHON) -m pytest
HF457 := .venv-hf457/bin/python
SERVING := .venv-serving/bin/python
INSTALLED := .venv/.installed
INSTALLED_HF457 := .venv-hf457/.installed
LM_EVAL := .venv-lm-eval/bin/lm_eval
INSTALLED_LM_EVAL := .venv-lm-eval/.installed
INSTALLED_SERVING := .venv-serving/.installed
TE := .venv-te/bin/python
INSTALLED_TE := .venv-te/.installed
PACKAGES := lib/python3.12/site-packages

# One thread a rank, and nothing is downloaded while anything runs.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo demo-sft test test-unit test-crash test-gpu test-layouts test-hf457 test-lm-eval test-serving test-te test-slurm chaos bench-data lint check

help:  ## show the targets
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## create .venv with every pinned dependency

$(INSTALLED): requirements/dev.txt requirements/uv.txt pyproject.toml
	@for python in python3.12 python3 python; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then \
	        found=$$python; break; \
	    fi; \
	done; \
	if [ -z "$$found" ]; then echo "Python 3.12 is not on the PATH; install it" >&2; exit 1; fi; \
	[ -x $(PYTHON) ] || $$found -m venv .venv
	[ -x $(UV) ] || $(PYTHON) -m pip install --quiet --require-hashes -r requirements/uv.txt
	$(UV) pip sync --quiet --compile-bytecode --python $(PYTHON) requirements/dev.txt
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable .
	@touch $@

demo-sft: $(INSTALLED)  ## fine-tune the demo on worked sums, solve held-out ones (after demo)
	$(PYTHON) tools/demo_sft.py

demo: $(INSTALLED)  ## corpus, tokenizer, training on two ranks, export, generated text
	$(PYTHON) tools/demo.py

test: $(INSTALLED)  ## all tests that need no GPU
	$(PYTEST) -n 2 tests/unit tests/repo
	$(PYTEST) -n 2 tests/parallel tests/layouts tests/exports tests/e2e tests/crash tests/slurm tests/chaos
	tools/test_slurm.sh

test-unit: $(INSTALLED)  ## tests in one process
	$(PYTEST) -n 2 tests/unit

test-crash: $(INSTALLED)  ## kill -9 of tokenization and of saves at random moments, 100 times each
	CRASH_KILLS=100 $(PYTEST) --timeout 3000 tests/crash

test-gpu: $(INSTALLED)  ## kernels on a CUDA device against their references
	TRITON_INTERPRET=0 $(PYTEST) tests/gpu

test-slurm: $(INSTALLED)  ## jobs on a real Slurm of this machine, which it installs if it may (minutes)
	tools/test_slurm.sh

chaos: $(INSTALLED)  ## 200 random schedules of faults; writes bench/results/chaos.json and docs/chaos.md (an hour)
	mkdir -p runs && rm -f runs/chaos.jsonl
	CHAOS_SCHEDULES=$${CHAOS_SCHEDULES:-200} CHAOS_RESULTS=$(CURDIR)/runs/chaos.jsonl \
	    $(PYTEST) -n 2 tests/chaos/test_chaos.py; status=$$?; \
	$(PYTHON) -m tests.chaos.table results=runs/chaos.jsonl && exit $$status

test-layouts: $(INSTALLED)  ## compare every kind of layout with one rank, try all mutants, write docs/layouts.md
	ALL_LAYOUTS=1 $(PYTEST) --timeout 400 tests/layouts

bench-data: $(INSTALLED)  ## data pipeline against other tools; MEGATRON_LM=DIR adds its scripts
	$(PYTHON) bench/data.py
	$(PYTHON) bench/index.py

test-hf457: $(INSTALLED_HF457)  ## exported folders in transformers 4.57, in an environment of its own
	$(HF457) -m pytest -c tests/hf457/pytest.ini --rootdir . tests/hf457

test-lm-eval: $(INSTALLED_LM_EVAL)  ## lm-evaluation-harness on an exported folder, in an environment of its own
	LM_EVAL=$(LM_EVAL) $(PYTEST) tests/lm_eval

$(INSTALLED_LM_EVAL): requirements/lm_eval.txt $(INSTALLED)
	[ -x $(LM_EVAL) ] || $(UV) venv --quiet --python $(PYTHON) .venv-lm-eval
	$(UV) pip sync --quiet --compile-bytecode --python .venv-lm-eval/bin/python requirements/lm_eval.txt
	@touch $@

$(INSTALLED_HF457): requirements/hf457.txt $(INSTALLED)
	[ -x $(HF457) ] || $(UV) venv --quiet --python $(PYTHON) .venv-hf457
	$(UV) pip sync --quiet --compile-bytecode --python $(HF457) requirements/hf457.txt
	@touch $@

test-serving: $(INSTALLED_SERVING)  ## vLLM on the CPU serves exported folders, in an environment of its own (minutes)
	$(SERVING) -m pytest -c tests/serving/pytest.ini --rootdir . tests/serving

$(INSTALLED_SERVING): requirements/serving.txt tools/vllm_ring_linear/pyproject.toml $(INSTALLED)
	[ -x $(SERVING) ] || $(UV) venv --quiet --no-project --no-python-downloads --python 3.11 .venv-serving
	UV_FIND_LINKS="$${UV_FIND_LINKS-$${PIP_FIND_LINKS-}}" \
	    $(UV) pip sync --quiet --compile-bytecode --python $(SERVING) requirements/serving.txt
	$(UV) pip install --quiet --python $(SERVING) --no-deps --no-build-isolation \
	    --editable tools/vllm_ring_linear
	@touch $@

test-te: $(INSTALLED_TE)  ## Transformer Engine's real modules without a GPU, in an environment of its own (TE_WHEEL=PATH, or it builds 8 minutes)
	$(TE) -m pytest -c tests/te/pytest.ini --rootdir . tests/te

# Only what it adds to .venv, which it sees through a path file, so that torch and megatron-core are
# those of all other tests. It looks for CUDA's libraries beside itself: the link.
$(INSTALLED_TE): requirements/te.txt requirements/te_torch.txt tools/build_te.sh $(INSTALLED)
	[ -x $(TE) ] || $(UV) venv --quiet --no-project --python $(PYTHON) .venv-te
	$(UV) pip sync --quiet --python $(TE) requirements/te.txt
	echo "import site; site.addsitedir('$(CURDIR)/.venv/$(PACKAGES)')" > .venv-te/$(PACKAGES)/venv.pth
	ln -sfn $(CURDIR)/.venv/$(PACKAGES)/nvidia .venv-te/$(PACKAGES)/nvidia
	[ -n "$(TE_WHEEL)" ] || [ -n "$$(ls .venv-te/wheels 2>/dev/null)" ] || \
	    tools/build_te.sh $(TE) .venv-te/wheels
	$(UV) pip install --quiet --python $(TE) --no-deps $(or $(TE_WHEEL),.venv-te/wheels/*.whl)
	@touch $@

lint: $(INSTALLED)  ## format, lint, types and import layers
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyrefly check
	.venv/bin/lint-imports

check: lint  ## what a change must pass
	$(PYTEST) -n 2 tests/unit tests/parallel tests/layouts tests/exports tests/repo
