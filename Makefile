# make demo: the main job on the embedded data, into runs/demo.   make test: lint, types, tests.
# Both set up everything they need in .venv, from a clean clone, with Python 3.10+ and make alone.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs clean

demo: .venv/installed
	@test -f runs/demo/settings.yaml && resume=--resume; $(BIN)/stillhouse distill --out runs/demo $$resume

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
