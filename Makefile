# make demo | docs | test | test-slow | test-cpus | test-quant | lint | format | clean; each sets up .venv first, once.
# make test-cpus runs the numerics tests as other CPUs would: other kernels, other blocking, more threads.
# make test-quant runs the tests on quantised bases, with libraries that are not in .venv.
# make test-install builds the wheel, installs it into a clean environment, and uses it from another folder (minutes).
# make test-parity compares rewards with the published packages, in an environment of its own (.venv-parity, 5 GB).
# make test-lowest runs the numerics tests with the lowest versions of pyproject.toml, in .venv-lowest.
# make docs builds the site of docs/ into build/site, with its links checked, in an environment of its own (.venv-docs).
# make test-docs runs the commands of README.md and docs/, as docs/commands.yaml says.
#
#   PYTHON=python3.12                interpreter of the environment (default: python3.11, else python3)
#   PIP_FLAGS="--extra-index-url U"  more flags for pip, as for a build of torch without CUDA
#   PYTEST_FLAGS="-k guidance"       more flags for pytest
#   WORKERS=1                        processes that share the tests (default: one a core, at most 4)
#   DEMO_TRAIN="--max_steps 5"       more options for the demo's training,
#   DEMO_EVAL="--num_prompts 8"      and for its evaluation

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv test test-slow test-cpus test-quant test-parity test-install test-lowest docs test-docs demo lint \
    format clean

# The first that runs, not the first that is found: a version manager's shim may stand for nothing.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
PIP_FLAGS ?=
PYTEST_FLAGS ?=
CORES := $(shell nproc 2>/dev/null || echo 2)
WORKERS ?= $(shell echo $$(($(CORES) < 4 ? $(CORES) : 4)))
DEMO_TRAIN ?=
DEMO_EVAL ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt $(PIP_FLAGS)

# The extra [app], by name: gradio 6.31 asks for pillow<13 and runs with 13, and the one that pip would take for
# constraints.txt is of 2023. The rest is what it needs beyond what is there.
APP := gradio gradio-client hf-gradio brotli groovy orjson pydub python-multipart pytz safehttpx semantic-version tomlkit

# Tests that share something costly stay in one process (the mark xdist_group). A worker has one thread: see conftest.py.
PYTEST := $(BIN)/python -m pytest -q
SHARED := -n $(WORKERS) --dist loadgroup

PARITY := .venv-parity
PARITY_PIP := $(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --no-input

LOWEST := .venv-lowest
LOWEST_PIP := $(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
    -c $(LOWEST)/lowest.txt $(PIP_FLAGS)
LOWEST_TESTS := integrations/test_apply_table.py commands/test_cli.py tasks/test_prompts.py rewards/test_remote.py \
    evaluation/test_rows.py rewards/test_serve.py runs/test_sweep.py

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
	@$(PYTEST) $(SHARED) -m 'not slow' $(PYTEST_FLAGS)

test-slow: $(STAMP)
	@echo '== slow tests'
	@$(PYTEST) $(SHARED) -m slow $(PYTEST_FLAGS)

test-cpus: $(STAMP)
	@echo '== numerics tests, as on other CPUs'
	@$(BIN)/python -m tests.support.cpus $(PYTEST_FLAGS)

# Beside the environment, not in it: some of them print at each import of diffusers.
QUANT := $(VENV)/quant
$(QUANT)/.installed: $(STAMP)
	@echo '== quantisation libraries: $(QUANT)'
	@$(PIP) --no-deps --target $(QUANT) bitsandbytes gguf torchao
	@touch $@

test-quant: $(QUANT)/.installed
	@echo '== tests on quantised bases'
	@PYTHONPATH=$(QUANT) $(PYTEST) tests/integrations/test_apply_quantised.py $(PYTEST_FLAGS)

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

test-install: $(STAMP)
	@echo '== the wheel, in a clean environment'
	@PYTHON='$(abspath $(BIN)/python)' PIP_FLAGS='$(PIP_FLAGS)' .ci/install

# The first run also shows that every test file can be imported with them.
test-lowest: $(LOWEST)/.installed
	@echo '== numerics tests with the lowest versions'
	@$(LOWEST)/bin/python -m pytest -q $(SHARED) -m numerics $(PYTEST_FLAGS)
	@echo '== tests of commands, prompts, rows, servers and sweeps with the lowest versions'
	@$(LOWEST)/bin/python -m pytest -q $(SHARED) -m 'not slow' $(addprefix tests/,$(LOWEST_TESTS)) $(PYTEST_FLAGS)

$(LOWEST)/.installed: pyproject.toml constraints.txt tests/support/lowest_versions.py
	@echo '== environment: $(LOWEST), a few minutes, once'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	    echo "error: the lowest versions are built for Python 3.11; give PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/python -m tests.support.lowest_versions > $(LOWEST)/lowest.txt
	@$(LOWEST_PIP) torch
	@$(LOWEST_PIP) -e '.[hpsv2,remote,serve,sweep]' pytest pytest-xdist hypothesis
	@touch $@

DOCS := .venv-docs

# It reads the code and does not import it. Warnings are errors, and the build asks nothing of the network.
docs: $(DOCS)/.installed
	@echo '== the site: build/site/index.html'
	@PATH="$(abspath $(DOCS))/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

$(DOCS)/.installed: pyproject.toml constraints.txt
	@echo '== environment: $(DOCS), half a minute, once'
	@$(PYTHON) -m venv --clear $(DOCS)
	@$(PYTHON) -c 'import tomllib; \
	    print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	    > $(DOCS)/docs.txt
	@$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt \
	    -r $(DOCS)/docs.txt
	@touch $@

test-docs: $(STAMP)
	@echo '== commands of README.md and docs/'
	@$(BIN)/python -m tests.support.documented_commands

# Nothing is downloaded. Threads: accelerate would otherwise take the number of physical cores, and warn.
demo: export HF_HUB_OFFLINE = 1
demo: export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
demo: $(STAMP)
	@echo '== demo 1/2: SPO trains a LoRA on a tiny model: things shall lie low in the picture -> runs/demo'
	@$(BIN)/accelerate launch --quiet --config_file launch/accelerate/cpu.yaml \
	    train_spo.py --config configs/tiny/demo.yaml --overwrite $(DEMO_TRAIN)
	@echo '== demo 2/2: guidance over a sweep of w on prompts that it never saw, and the report'
	@ckpt=$$(ls -d runs/demo/checkpoint-* | sort -V | tail -n 1); \
	    $(BIN)/python -m rlg.evaluate --config configs/eval/demo.yaml --ckpt "$$ckpt" $(DEMO_EVAL); \
	    echo "== report, with a slider over w: $$(ls -t runs/demo/eval/*/report.html | sed -n 1p)"; \
	    echo "== prompts of your own, in the browser: $(BIN)/python -m rlg.app --ckpt $$ckpt --reward gravity composition"

lint: $(STAMP)
	@echo '== lint'
	@status=0; $(BIN)/ruff check --quiet . || status=1; \
	    $(BIN)/ruff format --quiet --check . || { echo 'files are not formatted: make format' >&2; status=1; }; \
	    $(BIN)/codespell || status=1; exit $$status

format: $(STAMP)
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

# runs/ is kept: nothing here deletes results.
clean:
	@rm -rf $(VENV) $(PARITY) $(LOWEST) $(DOCS) build dist *.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
