# make demo: train two architectures on the embedded corpus and compare them. make test: lint, types and tests.
# make test-quick: the inner loop. Everything is installed into .venv, from the requirements files alone.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-quick test-long mutate lint clean

demo: .venv/run.stamp
	@$(BIN)/python -m tools.demo

test: lint
	@$(BIN)/python -m pytest -n auto -m "not long"

test-quick: .venv/dev.stamp
	@$(BIN)/python -m pytest -n auto -m "not long and not slow"

test-long: lint
	@$(BIN)/python -m pytest -n auto

mutate: .venv/dev.stamp  # MUTATE="--module train.py", "--sample 500 --slow", … (docs/TESTING.md)
	@$(BIN)/python -m tools.mutate $(or $(MUTATE),--sample 100)

lint: .venv/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# Half an environment would fail for ever: a Python that is too old makes none, and what fails half-way is removed.
.venv/bin/python:
	@$(PYTHON) blockgpt/startup.py
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/run.stamp: requirements.txt | .venv/bin/python
	@$(BIN)/python blockgpt/startup.py || { echo "error: .venv is of that Python (make clean, then again)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
