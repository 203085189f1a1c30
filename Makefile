# One place for what a person types: make demo, make test, make lint.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
DEMO ?= demo-out

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.intarsia-installed
# Torch first and alone: where pip has a CPU build of this version it takes that one, and nothing later asks for more.
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: demo test lint format install clean

demo: $(INSTALLED)
	$(BIN)/intarsia optimize wan-mini --target cpu-avx2 --quality "psnr>=35" --backend onnx --seed 0 --effort quick -o $(DEMO)
	$(BIN)/intarsia verify $(DEMO)
	@echo "report: $(abspath $(DEMO))/report.html"

# One thread a worker: two workers with two threads each are slower on two cores than one.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about three minutes, more on a slow line"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist out demo-out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
