# The two commands of the README, and what they are made of. Everything is installed into .venv from setup files.
PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
# Files of tests that run at once.
TEST_WORKERS ?= 2
PARALLEL = --numprocesses $(TEST_WORKERS) --dist loadfile

.PHONY: demo test lint style types unit gpu distributed clean sglang-cpu test-sglang test-slurm

demo: $(STAMP)  ## the same reward on two beliefs, with a report
	@$(VENV)/bin/urlvr study configs/demo.yaml

# Processes of a layout often wait for each other: mypy has room beside them.
test: style unit gpu  ## ruff, mypy, the CPU tests, and those of GPUs where one is
	@$(MAKE) --no-print-directory --jobs 2 types distributed

lint: style types

style: $(STAMP)
	$(call timed,ruff,$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .)

types: $(STAMP)
	$(call timed,mypy,$(VENV)/bin/mypy)

unit: $(STAMP)
	$(call timed,unit and kernel tests,$(VENV)/bin/pytest $(PARALLEL) tests/unit tests/kernels)

gpu: $(STAMP)
	$(call timed,GPU tests,$(gpu_tests))

SEES_GPU = nvidia-smi --list-gpus 2>/dev/null | grep --quiet GPU
gpu_tests = if $(SEES_GPU); then $(VENV)/bin/pytest tests/gpu; else echo "GPU tests: skipped, nvidia-smi lists no GPU."; fi

distributed: $(STAMP)
	$(call timed,distributed tests,$(VENV)/bin/pytest tests/distributed)
	$(call timed,integration tests,$(VENV)/bin/pytest $(PARALLEL) tests/integration)

# A new pyproject.toml or setup.py installs again. torch is resolved with the rest: see pyproject.toml for its range.
$(STAMP): pyproject.toml setup.py
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(call timed,installation,$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev]')
	@touch $@

clean:
	rm -rf $(VENV) runs bases build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# $(call timed,name,command): runs it and says how long it took.
define timed
	@start=$$(date +%s); $(2); status=$$?; echo "[$(1): $$(( $$(date +%s) - start )) s]"; exit $$status
endef

# SGLang has an environment of its own, outside the tree (see docs/rollout.md). Prints the path of its Python.
sglang-cpu:
	@$(PYTHON) servers/cpu_env.py

test-sglang: $(STAMP)  ## tests that need a real SGLang server, on this CPU
	$(call timed,tests against SGLang,URLVR_SGLANG_PYTHON="$$($(PYTHON) servers/cpu_env.py)" $(VENV)/bin/pytest --timeout 600 tests/sglang)

# A real cluster of four nodes on this machine (see docs/launch.md); whatever becomes of the tests, it is taken down.
test-slurm: export URLVR_SLURM_ROOT ?= /tmp/urlvr-slurm-test
test-slurm: $(STAMP)  ## launches with Slurm and NeMo-Run, on a cluster on this machine
	$(call timed,tests on Slurm,($(VENV)/bin/pytest --timeout 900 tests/slurm; status=$$?; slurm/local_cluster.sh down; exit $$status))
