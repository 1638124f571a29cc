# The few verbs of this repository. `make demo` and `make test` each work from a fresh clone.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Which tests `make test` runs: everything a CPU can do in minutes. Others by marker, for example
#   make test TIER="compile and not slow"
#   TRITON_INTERPRET=1 make test TIER=interpret     (a process of its own: see CONTRIBUTING.md)
TIER ?= not gpu and not slow and not vllm and not browser and not aot and not interpret and not compile and not ray and not trl and not fuzz
# More arguments for pytest, a path for example.
ARGS ?=

.PHONY: venv demo rubric-demo test lint bench clean

venv: $(STAMP)

# torch first and alone: what depends on it must find this version, not pick another.
$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/arr-fast demo --html demo.html

# Learns a hidden preference from 100 labelled pairs and prints the README's tables; resumes.
rubric-demo: $(STAMP)
	$(BIN)/arr-fast rubric demo --dir rubric-demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "$(TIER)" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/arr-fast bench judge --json bench_judge.json

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
