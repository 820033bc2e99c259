# The two commands are `make run` and `make test`; the rest is for developers. Everything lives in .venv and .novacron.
SHELL := /bin/bash
PY := .venv/bin/python
export PYTHONPATH := $(CURDIR)

.PHONY: run test check bench slow fuzz docs lock image boot clean prepare-run prepare-dev

run: prepare-run
	@$(PY) -m tools.demo $(ARGS)

test: check
	$(PY) -m pytest -n auto --dist worksteal -m "not slow" tests

# The property tests with new examples, and more of them, than the ordinary run draws.
fuzz: prepare-dev
	HYPOTHESIS_PROFILE=fuzz $(PY) -m pytest -n auto --dist worksteal -m "not slow" $$(grep -rl "from hypothesis import" tests --include='test_*.py') $(ARGS)

slow: prepare-dev
	@tools/setup/docker.sh || true
	$(PY) -m pytest -m slow tests

check: prepare-dev
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	$(PY) -m edge_runtime.contract.apidoc --check
	$(PY) -m edge_runtime.config doc --check

docs: prepare-dev
	$(PY) -m edge_runtime.contract.apidoc
	$(PY) -m edge_runtime.config doc

bench: prepare-dev
	$(PY) -m tools.bench.all $(ARGS)

image: prepare-dev
	@$(PY) -m firmware_images build $(ARGS)

boot: prepare-dev
	@$(PY) -m firmware_images boot $(ARGS)

lock: prepare-dev
	tools/setup/lock.sh

prepare-run:
	@tools/setup/prepare.sh run

prepare-dev:
	@tools/setup/prepare.sh dev

clean:
	rm -rf .venv .novacron .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info
