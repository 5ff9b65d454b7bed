# Everything here runs in .venv, which the first target that needs it makes by itself: from a Python 3.11 or newer
# and a package index, and from nothing else. `make help` tells the targets.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test chaos lint bench bench-gpu format proto lock clean \
        check-style check-types check-imports check-proto check-generated check-lock

BIN := .venv/bin
INSTALLED := .venv/.installed
CODE := $(wildcard proto registry plugins server tests examples benchmarks)
LOCK := $(BIN)/uv pip compile --quiet --python $(BIN)/python pyproject.toml --all-extras --group dev \
        --generate-hashes --universal --python-version 3.11 --no-header
PROTOC := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I proto \
        --python_out=proto --grpc_python_out=proto --mypy_out=quiet:proto --mypy_grpc_out=quiet:proto

# uv doesn't read pip's settings: an index that is set for pip is handed on, unless one is set for uv.
ifeq ($(value UV_DEFAULT_INDEX)$(value UV_INDEX_URL),)
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX := $(value PIP_INDEX_URL)
endif
endif

# The .venv is ours to write to: without bytecode every process would compile all of torch's modules again.
unexport PYTHONDONTWRITEBYTECODE

help: ## tell the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

demo: $(INSTALLED) ## fine-tune, hot-load and predict on handwritten digits, offline
	@$(BIN)/backboned demo

test: $(INSTALLED) ## run the tests, two files at a time (TESTS="tests/registry -k digest" runs some)
	@$(BIN)/python -m pytest $(or $(TESTS),--numprocesses 2 --dist loadfile --no-loadscope-reorder)

chaos: $(INSTALLED) ## mutate 10,000 checkpoint files, kill a daemon 100 times, fail its disks (CHAOS=1000: a tenth)
	@BACKBONED_CHAOS=$(or $(CHAOS),10000) $(BIN)/python -m pytest tests/chaos --log-level=WARNING --log-cli-level=WARNING

bench: $(INSTALLED) ## run the benchmarks (BENCH=benchmarks/NAME.py runs one)
	@for bench in $(or $(BENCH),$(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))); do \
		echo "· $$bench"; $(BIN)/python "$$bench" || exit 1; \
	done

bench-gpu: $(INSTALLED) ## run the serving benchmark on a CUDA device
	@$(BIN)/python benchmarks/serving.py --device cuda --out build/bench-gpu

lint: check-style check-types check-imports check-proto check-generated check-lock ## check everything but the tests

check-style: $(INSTALLED)
	@echo "· ruff: style"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --diff .

check-types: $(INSTALLED)
	@echo "· mypy: types"
	@$(BIN)/mypy --no-error-summary $(CODE)

check-imports: $(INSTALLED)
	@echo "· import-linter: imports point down"
	@out=$$($(BIN)/lint-imports --no-cache --no-logo 2>&1) || { echo "$$out"; exit 1; }

check-proto: $(INSTALLED)
	@echo "· buf: the proto"
	@$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code proto

check-generated: $(INSTALLED)
	@echo "· protoc: generated code is up to date"
	@$(BIN)/python -m pytest --quiet --no-header tests/packaging/test_generated_code.py >.venv/generated.log 2>&1 \
		|| { cat .venv/generated.log; exit 1; }

# A lock that is up to date comes out of a second resolution unchanged: uv keeps its pins and hashes, whatever has been
# released since.
check-lock: $(INSTALLED)
	@echo "· uv: requirements.lock agrees with pyproject.toml"
	@cp requirements.lock .venv/requirements.lock
	@if $(LOCK) --output-file .venv/requirements.lock >/dev/null 2>.venv/lock.log; then \
		diff -u requirements.lock .venv/requirements.lock || { echo "Run 'make lock' and commit it."; exit 1; }; \
	elif grep -q 'error sending request' .venv/lock.log; then \
		echo "  skipped: no package index can be reached from here"; \
	else \
		cat .venv/lock.log; echo "If pyproject.toml has changed: run 'make lock' and commit it."; exit 1; \
	fi

format: $(INSTALLED) ## format the code and mend what can be mended
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format --quiet .
	@$(BIN)/buf format --write proto

proto: $(INSTALLED) ## generate the Python code of the proto
	@$(PROTOC) $$(cd proto && find backboned -name '*.proto' | sort)

lock: $(INSTALLED) ## pin what pyproject.toml asks for (LOCK_FLAGS=--upgrade takes new releases)
	@$(LOCK) --output-file requirements.lock $(LOCK_FLAGS)
	@$(MAKE) --no-print-directory $(INSTALLED)

clean: ## remove .venv and whatever the tools left
	@rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv whose Python has gone, by an upgrade of the system, is made anew.
$(shell test -x $(BIN)/python || rm -f $(INSTALLED))
$(BIN)/python:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14; do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done || { echo "Python 3.11 or newer is needed: install one, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	echo "· .venv: new, by $$("$$python" --version)"; \
	"$$python" -m venv --clear .venv

# uv is pinned in the lock too: pip brings it first, checked by its hash, and it installs the rest.
$(INSTALLED): $(BIN)/python pyproject.toml requirements.lock
	@set -e; if ! test -x $(BIN)/uv; then \
		awk '/^uv==/ {uv = 1} uv {print} uv && !/\\$$/ {exit}' requirements.lock >.venv/uv.txt; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r .venv/uv.txt; \
	fi
	@echo "· .venv: installing what requirements.lock pins (some gigabytes at first: torch with CUDA)"
	@set -e; if test -t 2; then quiet=; else quiet=--quiet; fi; \
	$(BIN)/uv pip sync $$quiet --python $(BIN)/python --require-hashes requirements.lock; \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
