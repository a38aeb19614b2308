# Driftline. `make help` lists the targets; CI runs these and nothing else.
.DEFAULT_GOAL := help
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys, ensurepip, venv; sys.version_info >= (3, 11) and print(sys.executable)' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
DEV_STAMP := $(VENV)/.complete-dev
SOURCES := pyproject.toml constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
export OMP_NUM_THREADS ?= 1

.PHONY: help demo setup check test sim faults kafka bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## build the environment, run a generated shop stream through worker and learner, write a report
	$(BIN)/driftline demo

setup: $(DEV_STAMP) ## build the environment with what tests need (.venv)

check: $(DEV_STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check ## environment, ruff, mypy and every test that this machine can run, real Kafka included
	$(BIN)/python -m pytest -m "not slow" -ra

SEED ?=
SEEDS ?= 5000
sim: $(DEV_STAMP) ## the broker-free simulator: SEEDS=n of them, or SEED=n to replay one with its trace
	$(BIN)/python tests/simulator.py $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

MINUTES ?= 60
faults: $(DEV_STAMP) ## the long set of faults on real processes and a real broker, and a soak; writes docs/reliability.md
	$(BIN)/python tests/faults.py --report --minutes $(MINUTES)

kafka: $(DEV_STAMP) ## run a local Apache Kafka until Ctrl-C (needs Java 17 and, the first time, Maven)
	$(BIN)/python tests/kafka_broker.py run

bench: $(DEV_STAMP) ## the throughput benchmark beside its peers (minutes; builds their environments the first time)
	$(BIN)/python benchmarks/throughput.py --json

docs: $(DEV_STAMP) ## write the generated pages again: config.toml, configuration, commands, metrics, JSON Schemas
	$(BIN)/driftline config --template > .config.toml.new && mv .config.toml.new config.toml
	$(BIN)/driftline config --markdown > docs/configuration.md
	$(BIN)/driftline config --commands > docs/commands.md
	$(BIN)/driftline config --metrics > docs/metrics.md
	$(BIN)/python -m stream.schemas docs/schemas

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build ./*.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "driftline needs Python 3.11 or newer with the venv module, and none was found:" \
	  "python3 is $$(python3 --version 2>&1). On Debian and Ubuntu: apt-get install python3-venv." \
	  "Elsewhere: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python $(SOURCES)
	@echo "installing; torch with its CUDA libraries takes about 5 GB (README.md says how to take the CPU build)"
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(DEV_STAMP): $(BIN)/python $(SOURCES)
	@echo "installing; torch with its CUDA libraries takes about 5 GB (README.md says how to take the CPU build)"
	$(PIP) install --quiet -c constraints.txt -e '.[dev,compression,pretrain,sentiment]'
	@touch $(STAMP) $@
