# Every target makes its own virtual environment in $(VENV); nothing else on the machine is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints/cpu.txt
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint slow matrix wheel notebooks docs clean

demo: $(VENV)/.demo  ## the main job on the embedded model, offline
	$(BIN)/vlprune demo --out demo

test: $(VENV)/.dev  ## everything that runs without a GPU in minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu" tests

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow and not gpu" tests

matrix:  ## engine, adapters and laws on the oldest and the newest transformers; docs/running.md has the results
	for pins in oldest cpu; do \
	  python=$(VENV)/matrix/$$pins/bin/python; \
	  pip="$$python -m pip install --disable-pip-version-check -q -c constraints/$$pins.txt"; \
	  $(PYTHON) -m venv $(VENV)/matrix/$$pins && $$pip torch && $$pip -e ".[dev]" && $$python -m pip list | grep ^transformers && \
	  OMP_NUM_THREADS=1 $$python -m pytest -n 2 -m "not slow and not gpu" tests/engine tests/adapters tests/laws || exit 1; \
	done

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel

notebooks: $(VENV)/.dev  ## run the notebooks and keep their outputs; 07 needs a package (see it) and is run by hand
	$(BIN)/python notebooks/execute.py 01 02 03 04 05 06

docs: $(VENV)/.dev  ## regenerate what docs/ takes from code, and build the site in build/site
	$(BIN)/python -m vlprune.support
	$(BIN)/python -m vlprune.eval.docs --pictures missing
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist demo *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints/cpu.txt | $(BIN)/python
	$(INSTALL) torch && $(INSTALL) -e ".[demo]"
	touch $@

# lmms-eval's own requirements replace torch by another build and are not needed here
$(VENV)/.dev: pyproject.toml constraints/cpu.txt | $(BIN)/python
	$(INSTALL) torch && $(INSTALL) -e ".[dev,eval,notebooks,docs,demo]" && $(INSTALL) --no-deps lmms-eval==0.7.3
	touch $@
