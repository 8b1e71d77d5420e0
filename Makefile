# make demo | test | test-slow | lint | format | clean; each sets up .venv first, once.
# make test-parity compares rewards with the published packages, in an environment of its own (.venv-parity, 5 GB).
#
#   PYTHON=python3.12                interpreter of the environment (default: python3.11, else python3)
#   PIP_FLAGS="--extra-index-url U"  more flags for pip, as for a build of torch without CUDA
#   PYTEST_FLAGS="-k guidance"       more flags for pytest
#   DEMO_TRAIN="--max_steps 5"       more options for the demo's training,
#   DEMO_EVAL="--num_prompts 8"      and for its evaluation

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv test test-slow test-parity demo lint format clean

# The first that runs, not the first that is found: a version manager's shim may stand for nothing.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
PIP_FLAGS ?=
PYTEST_FLAGS ?=
DEMO_TRAIN ?=
DEMO_EVAL ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt $(PIP_FLAGS)

# The extra [app], by name: gradio 6.31 asks for pillow<13 and runs with 13, and the one that pip would take for
# constraints.txt is of 2023. The rest is what it needs beyond what is there.
APP := gradio gradio-client hf-gradio brotli groovy orjson pydub python-multipart pytz safehttpx semantic-version tomlkit

PARITY := .venv-parity
PARITY_PIP := $(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --no-input

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

venv: $(STAMP)
	@echo '== $(VENV) is ready'

$(STAMP): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '' 2>/dev/null || { \
	    echo "error: no Python ($(PYTHON)) that runs; give PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: the versions in constraints.txt need Python 3.11, and this is $$($(PYTHON) -V);" \
	    "give PYTHON=..." >&2; exit 1; }
	@echo "== environment: $(VENV) with $$($(PYTHON) -V), a few minutes, once"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "error: no venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "   torch ..."
	@$(PIP) torch
	@echo "   diffusers, transformers, peft and the rest ..."
	@$(PIP) -e '.[dev,wandb,tensorboard]'
	@$(PIP) --no-deps $(APP)
	@touch $@

test: $(STAMP)
	@echo '== tests, all but the slow ones'
	@$(BIN)/python -m pytest -q -m 'not slow' $(PYTEST_FLAGS)

test-slow: $(STAMP)
	@echo '== slow tests'
	@$(BIN)/python -m pytest -q -m slow $(PYTEST_FLAGS)

test-parity: $(PARITY)/.installed
	@echo '== rewards against the published packages'
	@CUDA_VISIBLE_DEVICES= $(PARITY)/bin/python -m pytest -q tests/parity $(PYTEST_FLAGS)

# The packages need torchvision, which needs its own build of torch: that of PyPI, whatever PIP_FLAGS says; === takes no
# 2.13.0+cpu. Their pins contradict everything else, hence --no-deps; timm has the version that image-reward asks for.
# hpsv2 comes without its vocabulary, which open_clip has.
$(PARITY)/.installed: pyproject.toml constraints.txt
	@echo '== environment: $(PARITY), many minutes, once'
	@$(PYTHON) -m venv --clear $(PARITY)
	@$(PARITY_PIP) "torch===$$(sed -n 's/^torch==//p' constraints.txt)" torchvision
	@$(PARITY_PIP) -c constraints.txt -e '.[dev]'
	@$(PARITY_PIP) --no-deps hpsv2==1.2.0 image-reward==1.5 timm==0.6.13 open_clip_torch==3.3.0
	@cd $(PARITY)/lib/python3*/site-packages && cp open_clip/bpe_simple_vocab_16e6.txt.gz hpsv2/src/open_clip/
	@touch $@

# Nothing is downloaded. Threads: accelerate would otherwise take the number of physical cores, and warn.
demo: export HF_HUB_OFFLINE = 1
demo: export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
demo: $(STAMP)
	@echo '== demo 1/2: GRPO trains a LoRA on a tiny model -> runs/demo'
	@$(BIN)/accelerate launch --quiet --config_file launch/accelerate/cpu.yaml \
	    train_grpo.py --config configs/tiny/demo.yaml --overwrite $(DEMO_TRAIN)
	@echo '== demo 2/2: guidance over a sweep of w, and the report'
	@$(BIN)/python -m rlg.evaluate --config configs/eval/demo.yaml \
	    --ckpt "$$(ls -d runs/demo/checkpoint-* | sort -V | tail -n 1)" $(DEMO_EVAL)
	@echo "== report: $$(ls -t runs/demo/eval/*/report.html | sed -n 1p)"

lint: $(STAMP)
	@echo '== lint'
	@status=0; $(BIN)/ruff check --quiet . || status=1; \
	    $(BIN)/ruff format --quiet --check . || { echo 'files are not formatted: make format' >&2; status=1; }; \
	    $(BIN)/codespell || status=1; exit $$status

format: $(STAMP)
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

# runs/ is kept: nothing here deletes results.
clean:
	@rm -rf $(VENV) $(PARITY) build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
