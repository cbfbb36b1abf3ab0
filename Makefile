# make demo: the main job on the embedded data, into runs/demo.   make test: lint, types, tests.   make docs: the pages, into site/.
# make faults: ends runs at 200 random moments, takes them up again and counts, into faults/; can be ended and started again itself.
# All set up everything they need in .venv, from a clean clone, with Python 3.10+ and make alone.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test faults docs clean

demo: .venv/installed
	@test -f runs/demo/settings.yaml && resume=--resume; $(BIN)/stillhouse distill --out runs/demo $$resume

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

faults: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.campaign --moments 200 --out faults

docs: .venv/installed-docs
	$(BIN)/python docs/make_methods.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
