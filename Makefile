# make quickstart | test | lint | install | clean
# Needs Python 3.11 to 3.14 and nothing else: everything is installed into .venv.
# ARGS reaches the program behind a target: make test ARGS="tests/losses -k kd"

.DEFAULT_GOAL := quickstart
.NOTPARALLEL:
.PHONY: quickstart test lint install clean browser

VENV := .venv
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet
BROWSER_SECONDS := 300

quickstart: install
	$(VENV)/bin/gacd quickstart $(ARGS)

test: $(VENV)/.test browser
	OMP_NUM_THREADS=1 PYTHONUTF8=1 $(VENV)/bin/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

install: $(VENV)/.package

clean:
	rm -rf $(VENV) build dist src/*.egg-info \
	  .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A name on the path proves nothing (pyenv's shims exist and fail), so each candidate is run.
$(VENV)/.python:
	@for python in python3.13 python3.12 python3.11 python3.14 python3; do \
	  if $$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
	    2>/dev/null; then \
	    echo "creating $(VENV) with $$python"; \
	    $$python -m venv $(VENV) && touch $@ && exit 0 || exit 1; \
	  fi; \
	done; \
	echo "make: no Python 3.11 to 3.14 with the venv module was found" >&2; exit 1

$(VENV)/.package: pyproject.toml | $(VENV)/.python
	@echo "installing gacd and its dependencies (PyTorch is large: this takes minutes)"
	$(PIP) -e .
	@touch $@

$(VENV)/.test $(VENV)/.lint: $(VENV)/.%: $(VENV)/.package
	$(PIP) -e '.[$*]'
	@touch $@

# The report's browser test skips itself where there is no browser: tried once, never required.
browser: $(VENV)/.browser
$(VENV)/.browser: | $(VENV)/.python
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && ! { command -v chromium && command -v chromedriver; } >/dev/null; then \
	  echo "installing chromium for the report's browser test"; \
	  { timeout $(BROWSER_SECONDS) apt-get update && DEBIAN_FRONTEND=noninteractive \
	    timeout $(BROWSER_SECONDS) apt-get install -y --no-install-recommends \
	    chromium chromium-driver; } >/dev/null 2>&1 \
	  || echo "chromium could not be installed; that test will be skipped"; \
	fi
	@touch $@
