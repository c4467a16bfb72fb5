# Start with `make demo` and `make test`. Each target creates .venv from requirements.txt if it is missing. README.md explains the targets.
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint bench ablation results faults clean

demo: $(VENV)/installed
	PY=$(PY) bash scripts/demo.sh

test: $(VENV)/installed
	$(PY) -m pytest -n 2 --dist worksteal tests

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .

bench: $(VENV)/installed
	$(PY) -m benchmarks.step
	$(PY) -m benchmarks.inference

ablation: $(VENV)/installed
	$(PY) -m benchmarks.ablation

results: $(VENV)/installed
	$(PY) -m benchmarks.results

faults: $(VENV)/installed
	$(PY) -m tests.robustness.faults

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) out seqs
