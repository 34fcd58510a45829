# make demo    set up what is missing, then turn a packaged frame into a video
# make test    set up what is missing, then run every check and test
# make setup   set up what is missing, development tools included
# make fmt     format the code and apply the linter's safe fixes
# make clean   remove caches and builds (.venv and out/ stay)
#
# PYTHON=...   the interpreter for .venv (3.11 or newer; found by itself otherwise)
# TORCH=...    the torch to install, pip flags included, for example
#              TORCH="torch==2.12.1 --index-url https://download.pytorch.org/whl/cpu"

TORCH ?= torch==2.13.0
PYTHON ?=
PYTEST_WORKERS ?= 2

# The demo, any part of which can be named on the command line.
MODEL ?= doom
IMAGE ?= src/aad1/packaged/$(MODEL)_frames/00.png
PROMPT ?= turn left
CHUNKS ?= 10
SEED ?= 0
OUT ?= out/demo.mp4

BIN := .venv/bin
RUN := $(BIN)/python
INSTALL := $(RUN) -m pip install --quiet

.PHONY: demo test setup fmt clean FORCE
.DEFAULT_GOAL := help
.PHONY: help
help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: .venv/.runtime
	@$(BIN)/aad1 generate --model $(MODEL) --image "$(IMAGE)" --prompt "$(PROMPT)" \
	    --chunks $(CHUNKS) --seed $(SEED) --out "$(OUT)"
	@echo "The video is $(abspath $(OUT))"

# One thread each: the networks under test are small, and $(PYTEST_WORKERS) tests run side by side.
test: .venv/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(PYTEST_WORKERS) --dist loadscope --cov --cov-report=term
	@$(RUN) tests/browser/find.py

setup: .venv/.development

fmt: .venv/.development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- .venv: a stamp file says which of pyproject.toml's needs are in it -------------------------

.venv/.runtime: .venv/.torch pyproject.toml
	@echo "Installing aad1 into .venv"
	@$(INSTALL) --editable .
	@touch $@

.venv/.development: .venv/.torch pyproject.toml
	@echo "Installing aad1 and its development tools into .venv"
	@$(INSTALL) --editable ".[dev]"
	@touch $@ .venv/.runtime

# torch comes first, so that nothing else can pull another build. One that is installed and in
# pyproject.toml's range stays, unless TORCH is given by name.
TORCH_NAMED := $(filter command environment,$(firstword $(origin TORCH)))
PYTHON_MISSING := $(if $(realpath $(RUN)),,yes)
.venv/.torch: pyproject.toml $(if $(TORCH_NAMED)$(PYTHON_MISSING),FORCE)
	@$(find_python); $(make_venv)
	@if [ -z "$(TORCH_NAMED)" ] && $(RUN) -c '$(torch_in_range)' 2>/dev/null; then \
	    echo "Keeping the torch that is in .venv"; \
	else \
	    echo 'Installing $(TORCH) into .venv'; $(RUN) -m pip install $(TORCH) || exit 1; \
	    $(RUN) -c '$(torch_in_range)' || { \
	        echo 'TORCH=$(TORCH) is outside the range that pyproject.toml allows' >&2; exit 1; }; \
	fi
	@touch $@

# Exit status 0 if the installed torch meets the requirement in pyproject.toml. pip brings packaging.
define torch_in_range
import sys, tomllib; \
from importlib.metadata import version; \
from pip._vendor.packaging.requirements import Requirement; \
needs = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
torch = next(r for r in map(Requirement, needs) if r.name == "torch"); \
sys.exit(not torch.specifier.contains(version("torch"), prereleases=True))
endef

new_enough := import sys; sys.exit(sys.version_info < (3, 11))
CANDIDATES := $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python3.14 python)

# Sets $$python: the one that PYTHON names, or the first of the usual names that is new enough.
define find_python
python=""; \
for name in $(CANDIDATES); do \
    if "$$name" -c '$(new_enough)' >/dev/null 2>&1; then python="$$name"; break; fi; \
done
endef

# A .venv that works is kept as it is; one that is broken, half made or too old is made anew.
define make_venv
if $(RUN) -c '$(new_enough)' 2>/dev/null && $(RUN) -m pip --version >/dev/null 2>&1; then :; \
elif [ -z "$$python" ]; then \
    echo "aad1 needs Python 3.11 or newer, and none is among:" $(CANDIDATES) >&2; \
    echo "Install one, or name it: make PYTHON=/path/to/python3" >&2; \
    exit 1; \
elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
    echo "$$python lacks the venv module. On Debian or Ubuntu: apt install python3-venv." >&2; \
    echo "Or name another Python: make PYTHON=/path/to/python3" >&2; \
    exit 1; \
else \
    echo "Making .venv with $$("$$python" --version)"; \
    "$$python" -m venv --clear .venv || exit 1; \
fi
endef

FORCE:
