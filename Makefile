# make demo       the whole way on a small model, from nothing
# make test       lint, types, a wheel in a clean environment, tests
# make test-all   the slow tests too
# make bench      speed beside other runtimes, hours; writes benchmarks/RESULTS.md
#
# Both set up .venv themselves; they need Python 3.11 or newer and make. A second run is fast.
#
# Options:
#   PYTHON=python3.12     which Python makes the environment
#   TORCH_INDEX=URL       where pip looks for torch besides its configured indexes. On Linux the
#                         default index gives the CUDA build; for the small CPU build use
#                         TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   JOBS=2                test processes at a time
#   TESTS=tests/ir        which tests
#   BENCH='--only cnn'    options of benchmarks/run.py

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
TORCH_INDEX ?=
JOBS ?= 2
TESTS ?= tests
BENCH ?=

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Each test process keeps to one thread, so that JOBS of them share the machine.
ONE_THREAD := OMP_NUM_THREADS=1 TVM_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
SOURCES := $(shell find hal passes targets kernels -name '*.py' -o -name '*.toml' -not -path '*/__pycache__/*')

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench lint format types wheel installed pytest clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: $(VENV)/.installed-demo
	$(BIN)/hal demo

# pytest comes last: its summary is the last thing that a reader of a log sees.
test: lint types installed pytest

test-all: lint types installed
	$(ONE_THREAD) $(BIN)/pytest -n $(JOBS) --dist loadgroup $(TESTS)

bench: $(VENV)/.installed-demo
	$(BIN)/python benchmarks/run.py $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) $(BENCH)

pytest: $(VENV)/.installed-test
	$(ONE_THREAD) $(BIN)/pytest -n $(JOBS) --dist loadgroup -m "not slow" $(TESTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Types are checked on the package as it is installed, where passes/ is hal.passes and so on.
types: build/types/.stamp
	cd build/types && MYPYPATH=. $(BIN)/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache --python-executable $(BIN)/python -p hal

build/types/.stamp: dist/.stamp
	rm -rf build/types && mkdir -p build/types
	$(PIP_INSTALL) --no-deps --target build/types dist/*.whl
	touch $@

wheel: dist/.stamp

dist/.stamp: $(SOURCES) pyproject.toml README.md LICENSE | $(VENV)/.installed-test
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	rm -rf build/lib build/bdist.*
	touch $@

# The wheel in an environment of its own, with the core dependencies only: no torch, no TVM.
installed: build/clean/.stamp build/sample.hal
	cd build && clean/bin/python -I ../tests/installed/use_bundle.py sample.hal

build/clean/.stamp: dist/.stamp
	test -x build/clean/bin/python || $(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --disable-pip-version-check --quiet --force-reinstall --no-deps dist/*.whl
	build/clean/bin/python -m pip install --disable-pip-version-check --quiet dist/*.whl
	touch $@

build/sample.hal: tests/installed/make_bundle.py $(SOURCES) | $(VENV)/.installed-test
	mkdir -p build
	$(BIN)/python tests/installed/make_bundle.py $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python found"; echo "hint: install Python 3.11 or newer, or give PYTHON=…"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11"; echo "hint: give another one: make PYTHON=python3.12 …"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# A stamp is as new as what it installed; a change of pyproject.toml installs again.
$(VENV)/.installed-demo: pyproject.toml | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[all]'
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[test]'
	touch $@ $(VENV)/.installed-demo

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
