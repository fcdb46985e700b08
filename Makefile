# The commands of the developers and of .ci/run. They use the Python of the active environment.
PYTHON ?= python
# Test processes, of up to a GiB each. Neighbouring tests stay in one process, since they share what they prepared.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist worksteal

.PHONY: check fmt test test-all test-gpu

check:  ## lint, format and types; `make fmt` mends what it can
	$(PYTHON) -m ruff check edgegt tools tests
	$(PYTHON) -m ruff format --check edgegt tools tests
	$(PYTHON) -m mypy --strict edgegt tools

test:  ## at most 10 minutes on 2 cores
	$(PYTHON) -m pytest $(PARALLEL) -m "not slow and not gpu"

test-all:  ## everything that this machine can run
	$(PYTHON) -m pytest $(PARALLEL)

test-gpu:  ## what needs CUDA; without it every test is shown as skipped
	$(PYTHON) -m pytest -m gpu

fmt:
	$(PYTHON) -m ruff check --fix edgegt tools tests
	$(PYTHON) -m ruff format edgegt tools tests
