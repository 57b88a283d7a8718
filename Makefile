# The only interface to the project. Every target works as the first command on a machine with Python 3.11 or newer.

PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13,$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
DEMO_OUT ?= demo
BENCH_OUT ?= runs/bench
# One more than there are cores: tests of several processes wait for one another much of the time.
TEST_WORKERS ?= $(shell expr `getconf _NPROCESSORS_ONLN` + 1)
DEMO_FLAGS ?=
BENCH_FLAGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests of one file go to one worker, which then trains what they share once, and in the order of files: large ones first
# would leave the few long tests for the end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --maxprocesses 4 \
	--dist loadscope --no-loadscope-reorder

# What the comments of conf/method advise for the tiny encoder and 16 samples per step.
HEADS := --model.num_prototypes 512 --model.head_hidden 512 --model.head_bottleneck 128
BALANCED := $(HEADS) --model.centre_rule balance --model.head_centring true --model.lr 5e-4
SMALL := \
	--also 'dino, small conf/method/dino.yaml $(BALANCED) --model.centre_momentum 0.83 --model.temperature_teacher [0.03,0.03]' \
	--also 'ibot, small conf/method/ibot.yaml $(BALANCED) --model.centre_momentum 0.85 --model.temperature_cls [0.03,0.03] --model.temperature_patch [0.03,0.035] --model.shared_head false' \
	--also 'dinov2, small conf/method/dinov2.yaml $(HEADS)' \
	--also 'mae, small conf/method/mae.yaml --model.decoder_dim 96 --model.decoder_depth 2 --model.decoder_heads 3' \
	--also 's2dc, small conf/method/s2dc.yaml --model.head_hidden 512 --model.head_dim 128' \
	--also 's2dc, small, SwinUNETR conf/method/s2dc.yaml --model.head_hidden 512 --model.head_dim 128 --backbone conf/backbone/swin_unetr_tiny.yaml'

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow fmt lint types smoke conf bench bench-gpu bench-data bench-methods wheel

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv and install the package, the demo's, the benches', the regions' and the developers' tools

$(STAMP): pyproject.toml $(wildcard constraints.txt)
	@test -n "$(PYTHON)" || { echo "agssd needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[demo,dev,bench,regions]'
	@touch $@

demo: $(STAMP) ## Simulate a cohort, pretrain, fine-tune, and print the table
	$(BIN)/agssd demo --out $(DEMO_OUT) $(DEMO_FLAGS)

test: $(STAMP) ## Run the tests except the slow ones
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP) ## Run every test, the slow ones too
	$(PYTEST)

fmt: $(STAMP) ## Format the code and fix what can be fixed
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

lint: $(STAMP) ## Check format, style and the dependency order
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/lint-imports

types: $(STAMP) ## Check the types strictly
	$(BIN)/mypy

smoke: $(STAMP) ## Run the demo in its short form
	$(BIN)/agssd demo --quick --out runs/smoke

conf: $(STAMP) ## Check conf/: every file parses and builds, agssd_small trains a few steps
	$(PYTEST) tests/conf

bench: $(STAMP) ## Time the hot paths against their alternatives, side by side, on the CPU (half an hour or more on 2 cores; less with BENCH_FLAGS="--rounds 3")
	$(BIN)/agssd bench-speed --device cpu --out $(BENCH_OUT) $(BENCH_FLAGS)

bench-gpu: $(STAMP) ## The same on a CUDA device
	$(BIN)/agssd bench-speed --device cuda --out $(BENCH_OUT) $(BENCH_FLAGS)

bench-data: $(STAMP) ## Compare crops and training views per second with other data engines
	$(BIN)/agssd bench-data --out $(BENCH_OUT) $(BENCH_FLAGS)

bench-methods: $(STAMP) ## Train every method for 200 steps on CACHE=labelled.h5, one table (about 2 minutes each on 2 cores)
	@test -n "$(CACHE)" || { echo "name a labelled cache: make bench-methods CACHE=hippocampus.h5"; exit 1; }
	$(BIN)/agssd bench-methods $(CACHE) $(filter-out conf/method/region_contrast%,$(wildcard conf/method/*.yaml)) --out $(BENCH_OUT)/methods $(SMALL) $(BENCH_FLAGS)

wheel: $(STAMP) ## Build the wheel into dist/
	$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir dist .
	@ls -1 dist/*.whl
