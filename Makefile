# Five words, the same for a person and for CI. Each sets up what is missing; a second run does no set-up work.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
FRAMEWORKS := .venv/frameworks

.PHONY: demo test check bench clean

demo: $(READY)
	$(BIN)/headwater demo $(ARGS)

test: $(FRAMEWORKS)
	$(BIN)/python -m pytest $(ARGS)

check: $(FRAMEWORKS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One figure: make bench FIGURE=core.1. All of them, and the README's table: make bench.
bench: $(FRAMEWORKS)
	$(BIN)/python -m bench $(FIGURE)

# The Python sources are used where they lie; only the native code and the dependencies need an install.
$(READY): pyproject.toml CMakeLists.txt constraints.txt $(wildcard src/kernels/*)
	@echo "Setting up .venv: PyTorch and the native code, some minutes the first time."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt cmake ninja scikit-build-core nanobind torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation --editable '.[torch,serve]'
	touch $@

$(FRAMEWORKS): $(READY)
	@echo "Setting up what tests and benchmarks need besides: Keras, TensorFlow, JAX, a minute the first time."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist
