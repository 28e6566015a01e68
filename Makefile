# Everything here needs Python 3.11 and make, and writes only below this folder, temporary files (TMPDIR) apart.
#
# PYTHON=path   the interpreter that .venv is made with (default: python3.11, else python3)
# ARGS="..."    more arguments for the program or the tests, as in: make test ARGS="-k rope -x"

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-cache-dir
# A mark for each installed extra; it holds this folder's path, since an editable install is tied to it.
MARK := $(VENV)/.installed-
MOVED := $(shell [ "`cat $(MARK)test 2>/dev/null`" = "$(CURDIR)" ] || echo moved)
INPUTS := setup.cfg pyproject.toml constraints.txt

export TF_CPP_MIN_LOG_LEVEL ?= 2
# Tools that would otherwise write to the home folder.
export MPLBACKEND ?= Agg
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib
export KERAS_HOME ?= $(CURDIR)/.cache/keras
export HF_HOME ?= $(CURDIR)/.cache/huggingface

.PHONY: help venv demo test parity golden lint doctest bench clean moved
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

venv: $(MARK)test ## Make .venv with dsv3 and its tests' needs, at the versions in constraints.txt
	@:

demo: venv ## Pretrain a small DeepSeek-V3 on embedded text; output in runs/demo
	@$(PY) examples/pretrain.py $(ARGS)

test: venv ## Run the tests that need no extra, in two processes (under 10 minutes)
	@$(PY) -m pytest -q -rs --ignore=tests/parity -n 2 --dist loadfile $(ARGS)

parity: $(MARK)parity ## Compare live with Hugging Face transformers and print a table
	@$(PY) -m pytest tests/parity -q -s $(ARGS)

golden: $(MARK)parity ## Write the golden files anew from transformers
	@$(PY) tests/parity/make_golden.py $(ARGS)

lint: $(MARK)lint ## Check the code's style with ruff
	@$(PY) -m ruff check . $(ARGS)

doctest: venv ## Run the examples in the docstrings
	@$(PY) -m pytest --doctest-modules dsv3 -q $(ARGS)

bench: $(MARK)parity ## Measure dsv3 beside transformers and print the ratios
	@$(PY) examples/benchmark.py $(ARGS)

clean: ## Remove .venv, caches and build files; runs/ stays
	@rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An interpreter that runs and is new enough, as the shell variable `found`. TensorFlow 2.21 has no build for 3.14.
find_python = found=; \
	for python in $(if $(PYTHON),"$(PYTHON)",python3.11 python3); do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	  then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo 'dsv3 needs Python 3.11 (3.12 and 3.13 may do); found none as $(or $(PYTHON),python3.11 or python3).' \
	    'Name one: make PYTHON=/path/to/python3.11' >&2; exit 1; \
	fi

$(MARK)test: $(INPUTS) $(MOVED)
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  $(find_python); \
	  echo "dsv3: making $(VENV) with `$$found --version`"; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	@echo 'dsv3: installing what setup.cfg asks for into $(VENV) (TensorFlow is large: some minutes)'
	@$(PIP) -c constraints.txt -e '.[test]'
	@echo "$(CURDIR)" > $@

$(MARK)parity $(MARK)lint: $(MARK)%: $(MARK)test
	@echo 'dsv3: installing the extra "$*" into $(VENV)'
	@$(PIP) -c constraints.txt -e '.[$*]'
	@echo "$(CURDIR)" > $@
