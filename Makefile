# make run    set everything up in .venv and run config.yaml (the embedded model; minutes, no GPU needed)
# make test   set everything up in .venv and run the tests, in as many processes as PROCESSES says
# make lint   formatting, types, import layers, workflow
# Both take PYTHON=/my/env/bin/python: an environment that already has torch; what is missing is installed into it.
# make run CORES=4 ARGS="--configfile my.yaml" passes arguments on to snakemake, here to run a study of your own.

CORES ?= all
# some tests wait more than they compute
PROCESSES ?= 3
BASE_PYTHON ?= python3

ifdef PYTHON
STAMPS := .venv/with/$(subst /,_,$(PYTHON))
PIP_INSTALL = $(PYTHON) -m pip install
else
STAMPS := .venv
PYTHON := .venv/bin/python
PIP_INSTALL = $(PYTHON) -m pip install --constraint constraints.txt
$(STAMPS)/run $(STAMPS)/test: .venv/bin/python
endif

# rules call `sparsetrace` by name
SCRIPTS = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('scripts'))")
RUN = PATH="$(SCRIPTS):$$PATH"

.PHONY: run test lint clean help

help:
	@sed -n '/^# make/s/^# //p' Makefile

run: $(STAMPS)/run
	@$(RUN) sparsetrace unlock
	$(RUN) snakemake --cores $(CORES) $(ARGS)

test: $(STAMPS)/test
	$(RUN) $(PYTHON) -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMPS)/test
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) snakefmt --check workflow rules
	$(RUN) mypy
	$(RUN) lint-imports
	$(RUN) snakemake --lint

clean:
	rm -rf .venv .snakemake results

.venv/bin/python:
	$(BASE_PYTHON) -c "import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else \
	  'error: python must be 3.11 or 3.12, got ' + sys.version.split()[0] + ': name one with BASE_PYTHON=')"
	$(BASE_PYTHON) -m venv .venv
	$(PYTHON) -m pip install --quiet --upgrade pip

$(STAMPS)/run: pyproject.toml constraints.txt
	$(PIP_INSTALL) --quiet --editable '.[generate,workflow,scipy]'
	@mkdir -p $(@D) && touch $@

$(STAMPS)/test: pyproject.toml constraints.txt
	$(PIP_INSTALL) --quiet --editable '.[dev]'
	@mkdir -p $(@D) && touch $@
