# Everything runs in .venv, which is built from pyproject.toml alone.

python := .venv/bin/python
# Compiled functions are kept between runs; benchmarks compile anew, because they time it.
demo test test-slow: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.cache/jax
demo test test-slow: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0.05
# A test's functions are small and run a few times: without LLVM's optimisations the suite takes half the time.
test: export JAX_DISABLE_MOST_OPTIMIZATIONS := 1

.PHONY: help setup demo test test-slow lint bench docs

help:
	@echo "make setup      create .venv with everything the project needs"
	@echo "make demo       co-design a chip and a network for handwritten digits; the report lands in runs/demo"
	@echo "make test       run the tests, minutes"
	@echo "make test-slow  run the slow tests too, the experiments among them"
	@echo "make lint       check style, format and types"
	@echo "make docs       build the documentation site in build/site; a warning is an error"
	@echo "make bench      time the cost model, the mapper and the training steps"

setup: .venv/installed

# A run never overwrites another: from the second time on, the directory carries the time.
demo: setup
	$(python) -m codesign run --out "$$(test -e runs/demo && date +runs/demo-%Y%m%d-%H%M%S || echo runs/demo)"

# Most of the time goes into compiling, which uses one core per process; a file stays in one process with its fixtures.
pytest := $(python) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: setup
	$(pytest)

test-slow: setup
	$(pytest) -m "slow or not slow"

lint: setup
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

bench: setup
	@for file in experiments/bench_*.py; do \
	  echo "== $$file"; $(python) -m "experiments.$$(basename "$$file" .py)" || exit 1; \
	done

docs: setup
	$(python) -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict
	@echo "open build/site/index.html"

# Newer than pyproject.toml once everything in it is installed.
.venv/installed: pyproject.toml
	@is_usable() { "$$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }; \
	if is_usable $(python); then exit 0; fi; \
	for candidate in $(PYTHON) python3.12 python3.13 python3.14 python3 \
	    "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do \
	  if is_usable "$$candidate"; then \
	    echo "Creating .venv with $$candidate"; exec "$$candidate" -m venv --clear .venv; \
	  fi; \
	done; \
	echo "No Python >= 3.12 with venv found on PATH or under pyenv. Install one, for example with" >&2; \
	echo "'apt install python3.12-venv' or 'pyenv install 3.12', or name it: make setup PYTHON=/path/to/python3" >&2; \
	exit 1
	$(python) -m pip install --quiet --editable '.[dev]'
	@touch $@
