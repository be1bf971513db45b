# Everything that people type. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := services/core services/api-gateway services/fl-server services/fl-client services/simulator
SOURCES := services tests bench deploy

TASK ?= image-folder
DATA ?=
TEST ?=
SITES ?= 3
ROUNDS ?= 3
REPORT ?=
KEEP ?=
SCAN ?=
SHUFFLED ?=
FILE ?=
DIR ?= images

# Nothing that runs here reports home.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export MLFLOW_DISABLE_TELEMETRY := true
# Images of Python often set it; every program that a test or the demo starts would then be compiled at each start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo demo-queue test test-containers images images-save up down logs backup restore lint types imports fmt bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv and install everything into it

# torch first and by itself: where pip finds a CPU build that is what it takes, and nothing later replaces it.
$(STAMP): constraints.txt requirements-dev.txt pyproject.toml $(addsuffix /pyproject.toml,$(PACKAGES))
	@$(PYTHON) -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] < (3, 13)))' || \
		{ echo "MedHive needs Python 3.11 or 3.12; set PYTHON=python3.11 (see README.md, Requirements)." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt \
		$(addprefix --editable ,$(PACKAGES))
	$(BIN)/pip check
	touch $(STAMP)

demo: $(STAMP) ## Run the main job on this machine: TASK=image-folder DATA= TEST= SITES=3 ROUNDS=3 REPORT= KEEP=1 SCAN= SHUFFLED=1
	$(BIN)/python deploy/demo/demo.py --task $(TASK) --sites $(SITES) --rounds $(ROUNDS) $(if $(DATA),--data "$(DATA)") \
		$(if $(TEST),--test "$(TEST)") $(if $(REPORT),--report "$(REPORT)") $(if $(KEEP),--keep) \
		$(if $(SCAN),--scan "$(SCAN)") $(if $(SHUFFLED),--shuffled)

demo-queue: $(STAMP) ## Twelve hospitals upload to a queue of ten; the status after each
	$(BIN)/python deploy/demo/queue_demo.py

# Two at a time: most tests wait for processes, so that two cores are busy with two. Who gets what: tests/conftest.py.
WORKERS ?= 2

# One thread a process: there are processes enough for all cores.
test: export OMP_NUM_THREADS := 1
test: $(STAMP) ## Run every test that needs no container engine
	$(BIN)/pytest -q --durations=15 --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder --ignore tests/containers

# Any engine that answers; or ENGINE=<program>, which brings one up with `start` and prints with `env` where it is.
test-containers: export MEDHIVE_NEEDS_ENGINE := 1
test-containers: $(STAMP) ## Build the images and run the tests that need a container engine
	$(BIN)/pytest -q --durations=15 tests/containers

images: ## Build all images
	docker compose build
	docker build --tag fl-client --file services/fl-client/Dockerfile .

images-save: ## Write the images to files for machines without a registry: DIR=images
	deploy/images-save.sh "$(DIR)"

up: ## Start the coordinator in containers
	docker compose up --detach

down: ## Stop the coordinator's containers; all that they know is kept
	docker compose down

logs: ## Follow the coordinator's logs
	docker compose logs --follow

backup: ## Write all that the coordinator's containers know to one file: FILE=...
	@deploy/backup.sh create "$(or $(FILE),medhive-$(shell date +%Y%m%d-%H%M%S).backup)"

restore: ## Put a backup into a coordinator that has nothing yet: FILE=...
	@deploy/backup.sh restore "$(FILE)"

lint: $(STAMP) imports ## Check style and import rules
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

imports: $(STAMP) ## Check that the services keep apart
	$(BIN)/lint-imports

types: $(STAMP) ## Check types
	$(BIN)/mypy services/core/medhive services/api-gateway/api_gateway services/fl-server/fl_server \
		services/fl-client/fl_client services/simulator/simulator deploy/demo deploy/backup.py

fmt: $(STAMP) ## Format the code
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(STAMP) ## Measure what docs/benchmarks.md says
	$(BIN)/python bench/run.py

clean: ## Remove what the demo, the tests and the builds left
	rm -rf demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
