# make demo   train on handwritten digits with the monitor attached (ARGS="--task text", ...)
# make test   style, types and every test
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/demo
	$(BIN)/gnsmon demo $(ARGS)

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(ARGS)

.venv/demo .venv/dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(@F)]"
	touch $@

clean:
	rm -rf .venv
