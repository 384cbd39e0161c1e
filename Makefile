# make demo: environment and pictures; make test: environment and tests. Each works alone on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# The newest of these that the Python takes: 3.9.0 from 3.11 on.
TRITON ?= triton>=3.4,<=3.9.0
PYTEST_ARGS ?= -n 2
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Writes where $(PYTHON) keeps its packages into the environment; fails if it has no torch that is new enough.
define LEND_TORCH
import glob, sys
try:
    import torch
except ImportError:
    sys.exit(1)
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
    sys.exit(1)
folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
with open(glob.glob(sys.argv[1] + "/lib*/python*/site-packages")[0] + "/lent_torch.pth", "w") as file:
    file.write("\n".join(folders) + "\n")
print("torch", torch.__version__, "of", sys.executable, "serves")
endef
export LEND_TORCH

.PHONY: help demo demo-model test test-slow test-versions lint clean
help:
	@echo "make demo           draw pictures with stock diffusers and with qwen_fast, compare them"
	@echo "make demo-model     train the demo checkpoint again, in demo-model/; interrupted, it goes on where it was"
	@echo "make test           pass the tests"
	@echo "make test-slow      pass the tests that take long, and those that need Chromium, Playwright and Ray, which it installs"
	@echo "make test-versions  pass the tests with the lowest, the newest and a set between of the supported packages"
	@echo "make lint           ruff"
	@echo "make clean          remove the environment and what was built"
	@echo "PYTHON=... takes another interpreter; one that has torch already lends it to the environment."

demo: $(VENV)/.ready
	$(BIN)/python -m qwen_fast.demo

demo-model: $(VENV)/.ready
	$(BIN)/python -m qwen_fast.demo.train --out demo-model

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q $(PYTEST_ARGS) -m "not slow" tests

test-slow: $(VENV)/.slow
	$(BIN)/python tests/slow/browser.py
	$(BIN)/python -m pytest -q $(PYTEST_ARGS) -m slow tests
	$(BIN)/python -m pytest -q tests/slow

test-versions: $(VENV)/.ready
	$(BIN)/python tests/house/versions.py

lint: $(VENV)/.ready
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

$(VENV)/.ready: setup.py pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer with the venv module is needed; $(PYTHON) is not (PYTHON=... names another)."; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || \
		{ echo "A C compiler is needed (torch.compile builds with it): install gcc or clang."; exit 1; }
	@# Only what an earlier, perhaps interrupted, run of this rule made is replaced, never an environment of the user's own.
	@test ! -e $(VENV) || test -e $(VENV)/.qwen-fast || \
		{ echo "$(VENV) exists and was not made by make: move it, or name another place with VENV=..."; exit 1; }
	rm -rf $(VENV)
	mkdir -p $(VENV) && touch $(VENV)/.qwen-fast
	$(PYTHON) -m venv $(VENV)
	@# A torch that is there already serves, whatever build it is: another would be a download of gigabytes. A path file,
	@# since --system-site-packages does not show what lies in a virtual environment.
	$(PYTHON) -c "$$LEND_TORCH" $(VENV) || $(BIN)/pip install -q '$(TORCH)'
	@# A CUDA build of torch brings the Triton it was made with; a CPU build brings none, and there is one for Linux only.
	if test "$$(uname)" = Linux; then $(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install -q '$(TRITON)'; fi
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.slow: $(VENV)/.ready
	$(BIN)/pip install -q -c constraints.txt -e '.[slow]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache
