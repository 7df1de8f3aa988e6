# `make demo` and `make test` build an environment in $(VENV) where there is none, install into it, and run.
# To choose: make test PYTHON=python3.12 VENV=.venv312 PYTEST_ARGS="-k packing"

VENV        ?= .venv
PYTHON      ?= $(shell for p in python3.11 python3.12 python3; do $$p -c pass 2>/dev/null && { echo $$p; break; }; done)
WORKDIR     ?= runs/demo
PYTEST_ARGS ?=
PIP         := $(VENV)/bin/python -m pip
# The pinned versions for the Python inside $(VENV).
CONSTRAINTS  = constraints/py$(shell $(VENV)/bin/python -c 'import sys; print("%d%d" % sys.version_info[:2])').txt
# The torch parts are tested where the constraints pin torch.
# AOT=1: the kernels are compiled for a Hopper GPU too, and emulated (0.4 GB of wheels, and CUDA 13's ptxas).
TEST_EXTRAS  = tfgan,test$(shell grep -q '^torch==' $(CONSTRAINTS) && echo ,convert,reference)$(if $(AOT),$(comma)aot)
comma       := ,

.PHONY: demo test lock clean

demo: $(VENV)/installed-demo
	$(VENV)/bin/python -m vq4dit_jax.main --config=configs/demo.py --workdir=$(WORKDIR)
	@echo "The report is $(WORKDIR)/report.html"

test: $(VENV)/installed-test$(AOT)
	$(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The stamps: an install set is installed again only when what it is made from has changed.
$(VENV)/installed-demo: $(VENV)/bin/python setup.cfg pyproject.toml $(wildcard constraints/*.txt)
	$(PIP) install --constraint $(CONSTRAINTS) --editable ".[tfgan]"
	touch $@

$(VENV)/installed-test$(AOT): $(VENV)/bin/python setup.cfg pyproject.toml $(wildcard constraints/*.txt)
	$(PIP) install --constraint $(CONSTRAINTS) --editable ".[$(TEST_EXTRAS)]"
	touch $@ $(VENV)/installed-demo

$(VENV)/bin/python:
	$(or $(PYTHON),$(error vq4dit-jax needs Python 3.11 or newer: make PYTHON=/path/to/python)) -m venv $(VENV)

# Writes the constraints of one Python anew, from what the registry has today:
#   make lock PYTHON=python3.11
#   make lock PYTHON=python3.12 LOCK_EXTRAS=tfgan,test,aot
# torch is asked for by its exact version, so that where several builds of it are on offer (CUDA, CPU) the machine's choice is taken.
LOCK_EXTRAS ?= tfgan,test,aot,convert,reference
LOCK_PINS   ?= $(if $(findstring convert,$(LOCK_EXTRAS)),torch==2.13.0)
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --upgrade pip
	.venv-lock/bin/python -m pip install --editable ".[$(LOCK_EXTRAS)]" $(LOCK_PINS)
	v=$$(.venv-lock/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
	file=constraints/py$$(echo $$v | tr -d .).txt && \
	{ echo "# Made by: make lock PYTHON=python$$v LOCK_EXTRAS=$(LOCK_EXTRAS)  (Linux, x86-64)"; \
	  .venv-lock/bin/python -m pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu$$//'; } > $$file.new && \
	mv $$file.new $$file
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv312 .venv-lock build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
