# make quickstart | make test | make check: each sets up $(VENV) first, once, and again when the versions change.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PYTEST_ARGS ?=
# Tests run in two processes of one thread each, the slow ones a file at a time; in one, whose output is seen at once,
# with PYTEST_ARGS='-n 0 -s'.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --durations 25
BENCH_ARGS ?=
FUZZ_EXAMPLES ?= 20000
INSTALLED := $(VENV)/.installed
# Fails at any warning: a link or an anchor that leads nowhere, a page that is not in the navigation.
SITE := NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
# Without compiled files beside the packages every command would compile torch anew, which takes longer than all the rest
# of its start; some images forbid them for everybody.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup base quickstart docs families test test-slow fuzz test-peers test-vllm bench bench-peers bench-gpu check format clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   all eight steps on CPU, on the project's own data and model"
	@echo "make base         train the quickstart's base model from nothing, 40 minutes (it is in the repository already)"
	@echo "make test         the tests of every mechanism (PYTEST_ARGS='-k name' for some of them)"
	@echo "make test-slow    faults, clusters, whole pipelines"
	@echo "make fuzz         inputs that nobody thought of, others each time (FUZZ_EXAMPLES=20000 of them)"
	@echo "make test-peers   against lm-evaluation-harness, and the rows of bench-peers on a tiny shape (on request only)"
	@echo "make test-vllm    the vLLM engine against the other one, vLLM installed in .venv-vllm (on request only)"
	@echo "make bench        speed and memory against the plain way, one table (BENCH_ARGS='--rows align judge')"
	@echo "make bench-peers  speed against TRL and vLLM, installed in .venv-trl and .venv-vllm (on request only)"
	@echo "make bench-gpu    speed, MFU and memory on a CUDA device (BENCH_ARGS='--shapes 0.5B')"
	@echo "make check        ruff, ruff format, mypy, shellcheck, the docs site with its links"
	@echo "make docs         write the reference pages from the code, build the site in site/"
	@echo "make families     write the table of docs/models.md from what a tiny model of each family does, 10 minutes"
	@echo "make setup        only the environment in VENV=$(VENV)"
	@echo "make clean        remove caches and build leftovers (runs/ and $(VENV) stay)"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "error: Python 3.11 or 3.12 is needed, not $(PYTHON); use make PYTHON=..." >&2; exit 2; }
	@# Debian keeps venv in a package of its own: root gets it here, others are told.
	@test -x $(VENV)/bin/pip || "$(PYTHON)" -m venv --clear $(VENV) || { \
		test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv && \
		"$(PYTHON)" -m venv --clear $(VENV); } || { rm -rf $(VENV); \
		echo "error: no virtual environment could be made; on Debian: apt-get install python3-venv" >&2; exit 2; }
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	VENV="$(VENV)" bash launch/local.sh configs/quickstart.toml

base: $(INSTALLED)
	$(VENV)/bin/python examples/phrasebook/make_base.py
	$(VENV)/bin/python examples/phrasebook/score_base.py

test: $(INSTALLED)
	$(PYTEST) --dist worksteal -m "not slow and not slurm and not gpu and not peers" $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	$(PYTEST) --dist loadfile -m "(slow or slurm) and not gpu and not peers" $(PYTEST_ARGS)

fuzz: $(INSTALLED)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(PYTEST) --dist loadfile tests/integration/test_fuzz_inputs.py tests/integration/test_fuzz_files.py $(PYTEST_ARGS)

test-peers: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m peers tests/peers/test_lm_eval.py tests/peers/test_benchmark_rows.py $(PYTEST_ARGS)

test-vllm: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m peers tests/peers/test_vllm_engine.py $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(VENV)/bin/python tests/benchmarks/bench.py $(BENCH_ARGS)

bench-peers: $(INSTALLED)
	$(VENV)/bin/python tests/benchmarks/bench.py --rows trl-sft trl-dpo vllm vllm-mixed --json runs/bench-peers.json $(BENCH_ARGS)

bench-gpu: $(INSTALLED)
	$(VENV)/bin/python tests/benchmarks/gpu.py $(BENCH_ARGS)

check: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck -x launch/*.sh slurm/*.sh slurm/*.sbatch .ci/run
	$(SITE)

families: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python -m numerics.family_table

docs: $(INSTALLED)
	$(VENV)/bin/python docs/write_reference.py
	$(SITE)

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site distributed/*.egg-info
	find configs distributed launch tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
