# Everything from a fresh clone: `make demo` shows the package at work, `make test` checks it. Needs Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PHOTOS ?=

.PHONY: demo test lint setup clean

# torch before the rest: with it in place no other package pulls the CUDA build in.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo "setting up $(VENV): some minutes, 2.5 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

setup: $(VENV)/.ready

demo: setup
	$(BIN)/python -m benchmarks.demo --output demo $(PHOTOS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

# A worker for each core, up to four, and one torch thread for each worker.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

clean:
	rm -rf $(VENV) demo build *.egg-info
