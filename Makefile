# make demo: the main job on the embedded data, into runs/demo.   make test: lint, types, tests.   make docs: the pages, into site/.
# make faults: ends runs at 200 random moments, takes them up again and counts, into faults/; can be ended and started again itself.
# make hostile: bad and hostile input, with counts.   make fuzz: every parser, FUZZ_SECONDS each.   make audit: known holes in what is installed.
# make lower-bounds: the tests with the oldest versions that pyproject.toml allows.
# All set up everything they need in .venv, from a clean clone, with Python 3.11+ and make alone.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs faults hostile fuzz audit lower-bounds clean

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

hostile: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:xdist tests/data/test_bad_images.py tests/data/test_annotations.py tests/hostile tests/report/test_hostile_report.py tests/fuzz

fuzz: .venv/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz

audit: .venv/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.7'
	$(BIN)/pip-audit --skip-editable

# Old packages warn of what newer ones have deprecated: here, unlike in `make test`, a warning is no failure.
# LOWER names requirements that replace lower bounds, such as LOWER='torch==2.14.1 torchvision==0.29.1' where those are too large to fetch.
lower-bounds:
	$(PYTHON) -m venv .venv-lower
	.venv-lower/bin/python -m pip install --quiet --disable-pip-version-check uv
	printf '%s\n' $(LOWER) > .venv-lower/overrides.txt
	.venv-lower/bin/uv pip compile --quiet --resolution lowest-direct --override .venv-lower/overrides.txt --extra test pyproject.toml -o .venv-lower/lowest.txt
	.venv-lower/bin/uv pip install --quiet --python .venv-lower/bin/python -r .venv-lower/lowest.txt -e .
	OMP_NUM_THREADS=1 .venv-lower/bin/python -m pytest -n 2 -W default --disable-warnings

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
	rm -rf .venv .venv-lower site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
