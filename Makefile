# Two commands for newcomers, `make run` and `make test`; each sets up what it needs in .venv, a virtual environment of the
# project's own. `make` alone lists all of them.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Processes that may not write what they compile each compile it all again: a third of what importing the tests takes.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: help run test slow lint types check bench chaos docs results matrix format clean

help: ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

run: $(READY) ## train the default app on 16 virtual clients; curves and model land in outputs/
	$(BIN)/psl-flower run --num-supernodes 16

test: $(READY) ## run the tests
	$(PYTEST)

slow: $(READY) ## run the tests that take minutes each
	$(PYTEST) -m slow

lint: $(READY) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## check types
	$(BIN)/mypy

check: lint types test ## all of the above

bench: $(READY) ## run the benchmarks, which print ratios
	@set -e; for file in tests/bench/bench_*.py; do echo "== $$file"; OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python $$file; done

SEED ?= 0
EPOCHS ?= 300
chaos: $(READY) ## train while everything fails: SEED=0 EPOCHS=300
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/bench_chaos.py --seed $(SEED) --epochs $(EPOCHS)

docs: $(READY) ## make the docs as a site, in site/; what Sphinx warns of is an error
	$(BIN)/sphinx-build -W --keep-going -b html docs site

SWEEPS ?= severe stragglers cifar10-small
results: $(READY) ## train what docs/results.md shows, an hour or so, and put its tables there anew: FASHION_MNIST=folder CIFAR10=folder
	@for sweep in $(SWEEPS); do \
		case $$sweep in cifar10*) path="$(CIFAR10)";; *) path="$(FASHION_MNIST)";; esac; \
		$(BIN)/psl-flower experiments run $$sweep --quick $${path:+--data-path "$$path"} || exit 1; done
	$(BIN)/python docs/remake_results.py

matrix: ## run the tests with the oldest and newest Python, Flower and torch: gigabytes, hours
	@test -x .nox/tool/bin/nox || ($(PYTHON) -m venv .nox/tool && .nox/tool/bin/python -m pip install --quiet nox)
	.nox/tool/bin/nox

format: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the commands above made
	rm -rf .venv .nox site .pytest_cache .mypy_cache .ruff_cache .hypothesis outputs build dist

$(READY): pyproject.toml constraints.txt
	@echo "Installing psl_flower and what it is tested with into .venv: 2.5 GB, or 7 with CUDA, in some minutes, only this once."
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $(READY)
