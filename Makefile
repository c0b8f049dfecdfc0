# make venv    everything below, installed into .venv        make bench    measure
# make build   compile the native libraries                 make format   lay out Python, C++ and CUDA
# make test    run the tests                                make lint     check layout, style and types
# make demo    a SAM encoder on a photograph                make clean    remove what these made
# make test-all           the slow ones too: every planted bug, architecture, dtype and head dimension
# make test-integrations  models of other libraries, in an environment of their own
#
# Needs python3, g++ and make; nvcc too, to compile the CUDA kernels.

PYTHON ?= python3
VENV   ?= .venv
# Pinned: on Linux a plain `torch` may fetch a CUDA build of several GB. Set TORCH to have another.
TORCH  ?= torch==2.13.0

BIN    := $(VENV)/bin
PY     := $(BIN)/python
# -qq: errors only, not a warning for each package index that lacks a package
PIP    := $(PY) -m pip install -qq --disable-pip-version-check
CXX_FILES = $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
RECENT_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
FOLDER := import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])
SITE   := import sysconfig; print(sysconfig.get_path("purelib"))

.PHONY: venv build test test-all test-integrations canaries demo bench format lint clean

# A PyTorch that python3 has already, as on most machines with a GPU, is used and not fetched again. Where python3 is of
# an environment itself, its packages are none of the system's: so the folder of PyTorch is named.
$(BIN)/has-torch:
	@echo "making $(VENV)"
	@if $(PYTHON) -c '$(RECENT_TORCH)' 2>/dev/null; \
	  then $(PYTHON) -m venv --system-site-packages $(VENV) \
	    && $(PYTHON) -c '$(FOLDER)' > "$$($(PY) -c '$(SITE)')/pytorch.pth"; \
	  else $(PYTHON) -m venv $(VENV) && { $(PIP) '$(TORCH)' || $(PIP) 'torch>=2.10'; }; fi
	@touch $@

$(BIN)/has-relpos_cuda: pyproject.toml setup.py $(BIN)/has-torch
	@echo "installing relpos_cuda with its test, demo and dev extras into $(VENV)"
	@$(PIP) --editable '.[test,demo,dev]'
	@touch $@

venv: $(BIN)/has-relpos_cuda

build: venv
	$(PY) -m relpos_cuda build all

# Two files of tests at a time: most tests use one core. Both run, whichever fails; the tests' summary comes last.
# Threads of theirs that wait for others sleep, and leave the core to those.
test: export OMP_WAIT_POLICY = PASSIVE
test: venv
	@$(PY) -m ruff check; ruff=$$?; $(PY) -m pytest -n 2 --dist loadfile --durations=15 $(ARGS) && exit $$ruff

test-all: export RELPOS_TEST_EVERYTHING = 1
test-all: test

# The packages of the test environment, and those of other libraries: some of these break others' imports.
OTHERS := .venv-integrations
$(OTHERS)/has-packages: tests/integrations/requirements.txt $(BIN)/has-relpos_cuda
	@echo "installing models of other libraries into $(OTHERS)"
	@$(PYTHON) -m venv --clear $$(grep -q '^include-system.*true' $(VENV)/pyvenv.cfg && echo --system-site-packages) $(OTHERS)
	@{ $(PY) -c '$(SITE)'; $(PY) -c '$(FOLDER)'; } > "$$($(OTHERS)/bin/python -c '$(SITE)')/test-environment.pth"
	@$(OTHERS)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r $<
	@touch $@

test-integrations: $(OTHERS)/has-packages
	@OMP_NUM_THREADS=1 $(OTHERS)/bin/python -m pytest --durations=5 tests/test_transformers.py tests/integrations $(ARGS)

canaries: venv
	RELPOS_TEST_EVERYTHING=1 $(PY) -m pytest tests/test_canaries.py

demo: venv
	$(PY) -m relpos_cuda demo $(ARGS)

bench: venv
	$(PY) -m relpos_cuda bench $(ARGS)

format: venv
	$(PY) -m ruff check --fix --select I
	$(PY) -m ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

lint: venv
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(PY) -m mypy

clean:
	rm -rf $(VENV) $(OTHERS) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
