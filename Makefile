# Everything from a machine with Python 3.11+ and make. `make demo` and `make test` each work alone, first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format quality table api clean

demo: $(READY)
	$(BIN)/python -m benchmarks.demo

# Two processes of one thread each: most tests are Python, not arithmetic.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(READY)
	$(BIN)/python -m benchmarks.quality

# The papers' table in small. Hours of CPU time from nothing; finished runs are kept in benchmarks/reconstruction.jsonl.
table: $(READY)
	$(BIN)/python -m benchmarks.table

api: $(READY)
	$(BIN)/python -m benchmarks.api_page out/api

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tfmq_fx needs Python 3.11 or newer, found " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# uv takes half a minute where pip takes two and a half. To compile, as pip does, takes it as long again: or where Python may write no
	# bytecode, all would be compiled in every process.
	$(BIN)/python -m pip install --quiet uv && $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable ".[dev]" \
		|| $(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) out build dist *.egg-info
