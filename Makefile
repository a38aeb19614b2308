# Everything a person or the CI calls. A fresh machine needs python3 (3.11 or newer, with venv) and make.
# A smaller torch: install the CPU build of torch into .venv by its own instructions first; `make setup` keeps it
# if its version is the one in constraints.txt.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys, venv; sys.version_info >= (3, 11) and print(sys.executable)' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(VENV)/.runtime: constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "driftline needs python3 >= 3.11 with the venv module; none was found (set PYTHON=...)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: setup
setup: $(VENV)/.runtime ## build the environment in .venv (about 2 minutes and 6 GB the first time)

.PHONY: demo
demo: setup ## a generated shop, forecasts, shift alerts and a report, in about 3 minutes
	$(BIN)/driftline demo

.PHONY: check
check: $(VENV)/.dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: test
test: check ## all tests that this machine can run, on a real Kafka where Java 17 and Maven are there
	$(BIN)/python -m pytest -m 'not slow'

.PHONY: kafka
kafka: $(VENV)/.dev ## start a local Kafka broker for trying things out; Ctrl-C ends it
	$(BIN)/python tests/kafka_broker.py run

.PHONY: bench
bench: $(VENV)/.dev ## throughput beside its peers, on a broker that it starts
	$(BIN)/python benchmarks/throughput.py

.PHONY: docs
docs: $(VENV)/.dev ## write the generated files again: config.toml, configuration reference, JSON Schemas
	$(BIN)/driftline config --template > config.toml
	$(BIN)/driftline config --markdown > docs/configuration.md
	$(BIN)/python -m stream.schemas docs/schemas
