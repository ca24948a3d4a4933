# Everything sets itself up from a bare clone: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: types

types:
	mkdir -p build/types && ln -sfn ../../kernels build/types/gsda_kernels
	MYPYPATH=build/types $(BIN)/python -m mypy -p gsda_fast -p gsda_kernels
