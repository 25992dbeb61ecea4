# make demo | test | bench | docs | wheel | lint | sanitize each build the environment first if it is missing or out of date.
#   PYTHON     the interpreter the environment is made from (python3)
#   PIP_FLAGS  passed to every pip install, e.g. --index-url
#   DIST       where `make wheel` puts the wheel (dist)
PYTHON ?= python3
PIP_FLAGS ?=
DIST ?= dist
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
CXX_TESTS = $(shell find tests -name '*.h' -o -name '*.cpp')

.PHONY: env demo test bench docs wheel lint sanitize format clean

env: $(VENV)/.built

$(VENV)/.requirements: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "quantopt needs Python 3.11 or later, $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "python -m venv failed: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	$(PIP) install $(PIP_FLAGS) "$$(grep '^torch==' requirements.txt)"
	$(PIP) install $(PIP_FLAGS) -r requirements.txt
	@touch $@

$(VENV)/.built: $(VENV)/.requirements setup.py pyproject.toml quantopt/_version.py $(CXX_FILES)
	$(PIP) install $(PIP_FLAGS) --no-build-isolation --no-deps -e .
	@touch $@

demo: env
	$(PY) -m quantopt.train.demo

test: env
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

bench: env
	$(PY) -m pytest bench --benchmark-enable --benchmark-only

sanitize: $(VENV)/.requirements
	$(PY) setup.py -q sanitize

docs: $(VENV)/.requirements
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# auditwheel reads off the extension which systems can load it, and tags the wheel; torch's libraries stay torch's.
wheel: $(VENV)/.requirements
	rm -rf build/wheel build/lib* build/bdist*
	$(PIP) wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH="$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH" $(PY) -m auditwheel repair \
	  --exclude 'libtorch*' --exclude 'libc10*' -w $(DIST) build/wheel/*.whl
	@ls -l $(DIST)

lint: $(VENV)/.requirements
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES) $(CXX_TESTS)

format: $(VENV)/.requirements
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES) $(CXX_TESTS)

clean:
	rm -rf build dist *.egg-info quantopt/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f $(VENV)/.built
