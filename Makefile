# Each target sets up what it needs first, which is quick when it is there: see tools/setup.sh.
# ARGS goes to the command: make run ARGS='--events process.*', make test ARGS='-k exec'.

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
ARGS :=
PYTHON_BIN := .venv/bin/python
# Debian keeps mosquitto and ip where only root looks.
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: help run setup test test-unit test-image test-kernels test-faults verify lint gen lock bench brokers brokers-stop clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

run: ## set up, and stream kernel events to the terminal until Ctrl-C (root)
	@tools/setup.sh run
	@exec .venv/bin/streamer run $(ARGS)

setup: ## set up only; leaves .venv/bin/streamer
	@tools/setup.sh run

# In two processes, see tests/conftest.py. Without: make test PARALLEL=
PARALLEL := -n 2

test: ## set up, and run all tests: this kernel, a real Kafka, a real Mosquitto (root)
	@tools/setup.sh test
	@exec $(PYTHON_BIN) -m pytest $(PARALLEL) $(ARGS)

test-unit: ## the tests that need neither root nor brokers
	@tools/setup.sh dev
	@exec $(PYTHON_BIN) -m pytest tests/unit $(ARGS)

test-image: ## build the container image with podman, without a registry, and run it (root, slow)
	@tools/setup.sh dev
	@exec tools/image.sh test $(ARGS)

# On which kernels, for how many minutes at most on each, and, for CI, what came of the tests here.
KERNELS := bullseye bookworm trixie sid
MINUTES := 180
HOST :=
# WRITE=--write puts what each kernel gives into docs/kernels.md, what came of faults into reliability.md.
WRITE :=

test-kernels: KERNELS += bullseye/headers bookworm/headers bookworm/lockdown sid/norings trixie-arm64
test-kernels: ## the kernel's tests on stock Debian kernels 5.10 to 7.2 in virtual machines (root, slow)
	@tools/setup.sh dev
	@$(PYTHON_BIN) bpf/build.py --all
	@tools/kernels.sh setup $(foreach one,$(KERNELS),$(firstword $(subst /, ,$(one))))
	@[[ " $(KERNELS)" != *-arm64* ]] || tools/arm64.sh
	@exec $(PYTHON_BIN) -m tests.vm.suite $(KERNELS:%=--kernel %) --minutes $(MINUTES) \
		$(HOST:%=--host %) $(WRITE) -- $(ARGS)

# Writes docs/reliability.md with WRITE=--write; ARGS='-m "not slow"' is the part that CI runs.
test-faults: ## break brokers, networks, disks and the agent under load, and count what is left (root, slow)
	@tools/setup.sh test
	@exec $(PYTHON_BIN) -m pytest tests/faults -o faulthandler_timeout=900 $(WRITE) $(ARGS)

verify: KERNELS += bullseye/headers bookworm/headers trixie-arm64
verify: ## what the verifier says of every program on those kernels, as a table (root, slow)
	@tools/setup.sh dev
	@$(PYTHON_BIN) bpf/build.py --all
	@tools/kernels.sh setup $(foreach one,$(KERNELS),$(firstword $(subst /, ,$(one))))
	@[[ " $(KERNELS)" != *-arm64* ]] || tools/arm64.sh
	@exec $(PYTHON_BIN) -m tests.vm.verifier $(KERNELS:%=--kernel %) $(ARGS)

lint: ## check style, types, generated files, and that released schemas still hold
	@tools/setup.sh dev
	$(PYTHON_BIN) -m ruff check
	$(PYTHON_BIN) -m ruff format --check
	$(PYTHON_BIN) -m mypy
	$(PYTHON_BIN) -m tools.gen --check
	$(PYTHON_BIN) -m tools.schemas

gen: ## derive events.py, schemas/ and docs/ from bpf/events.h and the settings
	@tools/setup.sh run
	$(PYTHON_BIN) -m tools.gen

lock: ## pin the Python packages anew, with hashes
	@tools/lock.sh $(ARGS)

bench: ## the benchmarks, each beside its plain alternative (root)
	@tools/setup.sh bench
	@exec $(PYTHON_BIN) -m benchmarks $(ARGS)

brokers: ## start a Kafka on 127.0.0.1:19092 and a Mosquitto on 127.0.0.1:18883
	@tools/setup.sh test
	@tools/brokers.sh start

brokers-stop: ## stop them
	@tools/brokers.sh stop

clean: ## remove all that was built; what was downloaded stays in .cache
	rm -rf .venv build dist streamer/bpf streamer/ring/*.so streamer/sinks/kafka/*.so *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
