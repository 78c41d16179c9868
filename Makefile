# Every target sets up what it needs in .venv, from a bare machine with Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: finetune test passes test-quick record lint package gpu test-gpu docs notebook bench bench-quick bench-ops clean

finetune: $(VENV)/demo.stamp
	$(RUN) -m pst_kernels.cli finetune --output runs/finetune $(ARGS)

# One thread a worker: two workers of two threads would fight for two cores.
# Files whose tests share what takes long to make go to one worker: tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto

# Lint beside the passes of the CPU, which each worker would compile for itself
test: $(VENV)/dev.stamp
	$(MAKE) --no-print-directory --jobs=2 lint passes
	$(PYTEST) -m "not gpu" $(ARGS)

passes: $(VENV)/dev.stamp
	$(RUN) -m pst_kernels.cpu.compiled

# For everyday work
test-quick: $(VENV)/dev.stamp
	$(PYTEST) -m "not gpu and not slow and not compiled" $(ARGS)

# The machine code of every shipped binary, and the PTX that tests execute, after a change of kernels: tests compile
# what this hasn't kept.
record: $(VENV)/dev.stamp
	PYTHONPATH=.:tests $(RUN) tests/triton/recorded.py
	PYTHONPATH=.:tests $(RUN) -m emulator.kept

lint: $(VENV)/dev.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The wheel and the sdist, each installed into an empty environment that runs README's quick start
package: $(VENV)/dev.stamp
	$(RUN) tests/package/fresh_install.py $(ARGS)

# All that needs a GPU, in nine minutes, on a machine without network: with the Python that is there, installing nothing.
gpu:
	@$(PYTHON) -c 'import numpy, torch, triton' || { \
		echo "$(PYTHON) needs torch with CUDA, triton and numpy; name a Python that has them: make gpu PYTHON=..."; exit 2; }
	PYTHONPATH=. $(PYTHON) -m bench gpu $(ARGS)

# The GPU tests alone
test-gpu: $(VENV)/dev.stamp
	$(RUN) -m pytest -m gpu $(ARGS)

# The pages of docs/ as a site in runs/site; fails on a broken link, or a name that does not exist
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

# The notebook of examples/ with its pictures, as a page in runs/
notebook: $(VENV)/notebook.stamp
	$(RUN) -m nbconvert --to html --execute --output-dir runs examples/where_the_zeros_lie.ipynb

bench: $(VENV)/dev.stamp
	$(RUN) -m bench $(ARGS)

bench-quick: $(VENV)/dev.stamp
	$(RUN) -m bench --quick $(ARGS)

bench-ops: $(VENV)/dev.stamp
	$(RUN) -m pytest bench --benchmark-only $(ARGS)

$(RUN):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip setuptools

# torch first and pinned, so that no dependency of the rest chooses another build of it
$(VENV)/%.stamp: setup.py constraints.txt | $(RUN)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
