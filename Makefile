# `make demo` and `make test` set up .venv on their first run; a second run goes straight to the work.
# pip reads PIP_INDEX_URL and PIP_EXTRA_INDEX_URL from the environment, for a mirror or for the CPU build of torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "calig needs Python 3.11 or newer; set PYTHON=python3.11 (found: $$($(PYTHON) --version))"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } \
		|| { rm -rf $(VENV); echo "no virtual environment can be made; on Debian: apt install python3-venv"; exit 1; }
	@echo "installing into $(VENV) (some minutes on the first run) ..."
	@# torch first and by its pinned version, so that no other package's range brings another build.
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/calig run experiment=quickstart run.overwrite=true

test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=typings $(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
