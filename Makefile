# make demo: environment and pictures; make test: environment and tests. Each works alone on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
PYTEST_ARGS ?= -n 2
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-versions lint clean
help:
	@echo "make demo           draw pictures with stock diffusers and with qwen_fast, compare them"
	@echo "make test           pass the tests"
	@echo "make test-versions  pass the tests with the lowest and the newest supported packages"
	@echo "make lint           ruff"
	@echo "make clean          remove the environment and what was built"
	@echo "PYTHON=... takes another interpreter; one that has torch already lends it to the environment."

demo: $(VENV)/.ready
	$(BIN)/python -m qwen_fast.demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q $(PYTEST_ARGS) tests

test-versions: $(VENV)/.ready
	$(BIN)/python tests/versions.py

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(VENV)/.ready: setup.py pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer with the venv module is needed; $(PYTHON) is not (PYTHON=... names another)."; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || \
		{ echo "A C compiler is needed (torch.compile builds with it): install gcc or clang."; exit 1; }
	rm -rf $(VENV)
	@# A torch that is there already serves, whatever build it is: another would be a download of gigabytes.
	if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
		$(PYTHON) -m venv $(VENV) && $(BIN)/pip install -q '$(TORCH)'; \
	fi
	@# A CUDA build of torch brings the Triton it was made with; a CPU build brings none.
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install -q '$(TRITON)'
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache
