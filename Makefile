# Everything that a person or a build server runs. `make help` lists it.

BACKEND ?= memory
BROKERS := redis rabbitmq
CONTRACT ?= $(BROKERS) sqs-moto
# The harness of each provider that proves every clause in `make test`.
MAIN := memory $(BROKERS) sqs-ministack
# Most of the tests' time is spent waiting: more processes than processors, by measuring.
WORKERS ?= 6
LOOP ?=
ARGS ?=

SUITE := contract-tests/src/abe_contract_tests/suite
UV = $(or $(shell scripts/bootstrap),$(error no uv, and none could be installed))
CONTRACTS = $(addprefix --contract ,$(CONTRACT)) $(addprefix --contract-loop ,$(LOOP))
KILLED = $(or $(filter-out memory,$(BACKEND)),redis)
RUN = $(UV) run --locked

.DEFAULT_GOAL := help
.PHONY: help demo sigkill test test-all contract containers check lock lint format imports lines subjects mypy pyright workflows simulate bench environment brokers

help: ## List the commands.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: environment ## Show the main job, as it happens: make demo, make demo BACKEND=redis, or rabbitmq, or sqs.
	@$(if $(filter $(BROKERS),$(BACKEND)),scripts/ci/brokers $(BACKEND))
	$(RUN) python examples/demo.py --backend $(BACKEND)

sigkill: environment ## Kill a consumer process at work, and show that nothing is lost: make sigkill, make sigkill BACKEND=rabbitmq.
	@$(if $(filter $(BROKERS),$(KILLED)),scripts/ci/brokers $(KILLED))
	$(RUN) python examples/sigkill.py --backend $(KILLED)

test: environment brokers ## Run what proves the project in minutes, on brokers of its own. ARGS goes to pytest.
	$(RUN) pytest -n$(WORKERS) -m "not thorough" -o "contract_harnesses=$(MAIN)" $(ARGS)

test-all: environment brokers ## Run every test: every harness and server, the examples, the packages, the tests of the tests.
	$(RUN) pytest -n$(WORKERS) $(ARGS)

contract: environment brokers ## Run the contract suite alone, on all brokers or on one: make contract CONTRACT=redis LOOP=uvloop.
	$(RUN) pytest -n$(WORKERS) $(SUITE) $(CONTRACTS) $(ARGS)

containers: environment ## Run the contract suite on brokers in containers, the images built here where no registry answers.
	scripts/ci/offline-images $(sort $(filter $(BROKERS) sqs-moto,$(CONTRACT)))
	ABE_TEST_SERVICES=containers $(RUN) pytest -n$(WORKERS) $(SUITE) $(CONTRACTS) $(ARGS)

check: lock lint format imports lines subjects mypy pyright workflows ## Lint, type-check, and hold the lock file and the layers to their rules.

lock: environment
	$(UV) lock --check

lint: environment
	$(RUN) ruff check

format: environment
	$(RUN) ruff format --check

imports: environment
	$(RUN) lint-imports

lines: environment
	$(RUN) python scripts/ci/lines.py

subjects:
	scripts/ci/subjects

mypy: environment
	$(RUN) mypy

pyright: environment
	$(RUN) pyright

workflows: environment
	$(RUN) actionlint
	@echo "actionlint: no findings"

simulate: environment ## Run the engine in simulated worlds: make simulate ARGS="0 --count 500 --keep-going".
	$(RUN) python -m simulation $(ARGS)

bench: environment brokers ## Measure throughput and latency beside the raw clients.
	$(RUN) python -m benchmarks $(ARGS)

environment:
	@echo "environment: the locked packages, in .venv"
	@$(UV) sync --locked --quiet

brokers:
	@scripts/ci/brokers
