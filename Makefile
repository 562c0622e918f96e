# Each target stands alone: on its first run it makes a virtual environment and installs what it needs.
#
#   make demo        train a small network on handwritten digits
#   make test        the tests that need neither a GPU nor the CUDA toolkit
#   make test-slow   the tests marked slow
#   make test-cuda   compile the CUDA kernels and inspect their machine code (no GPU needed)
#   make lint        ruff and mypy
#   make bench       measure fastconv beside the peers that are installed; BENCH=quick: in under 5 minutes;
#                    BENCH=readme: what the README and docs/performance.md show
#   make bench-growth  how time and memory grow with the sizes of a layer
#   make bench-cuda  the kernels on a CUDA GPU, checked and timed in under 8 minutes; installs nothing
#   make bench-report  the tables of docs/performance.md and the README, and the plots, from bench/results/;
#                    ARGS=bench/measured: a page of what you have measured yourself
#   make clean       remove the virtual environments and caches
#
# PYTHON=python3.12 chooses the interpreter; ARGS="..." goes to the demo, to pytest or to the benchmarks.

PYTHON ?= python3
ARGS ?=
BENCH ?= full
VENV := .venv
VENV_CUDA := .venv-cuda

.PHONY: demo test test-slow test-cuda lint bench bench-growth bench-cuda bench-report clean

demo: $(VENV)/.installed-demo
	$(VENV)/bin/python -m fastconv demo $(ARGS)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest $(ARGS)

test-slow: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -m "slow and not codegen" $(ARGS)

# FASTCONV_TEST_GPU=1 takes CUDA's own compiler in the place of the simulator; to compile needs no GPU.
test-cuda: $(VENV_CUDA)/.installed-cuda
	FASTCONV_TEST_GPU=1 $(VENV_CUDA)/bin/python -m pytest -m "codegen and not slow" tests/cuda/test_cuda_*codegen.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m mypy

# Rows of your own go to bench/measured, which git ignores; those that the pages are made of are in bench/results.
BENCH_full := --output bench/measured
BENCH_quick := --quick --output bench/measured
BENCH_readme := --readme all --output bench/results

# The peers are whatever is installed beside fastconv, for example by `.venv/bin/pip install torch onnxruntime onnx`.
bench: $(VENV)/.installed-bench
	$(VENV)/bin/python -m fastconv bench $(BENCH_$(BENCH)) $(ARGS)

bench-growth: $(VENV)/.installed-bench
	$(VENV)/bin/python -m fastconv bench --growth all --peer torch --output bench/measured $(ARGS)

# With the packages that $(PYTHON) has: numba-cuda, and torch or CuPy.
bench-cuda:
	$(PYTHON) -m bench.cuda $(ARGS)

bench-report: $(VENV)/.installed-bench
	$(VENV)/bin/python -m fastconv.bench.report $(ARGS)

clean:
	rm -rf $(VENV) $(VENV_CUDA) build fastconv.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# A stamp per set of extras, older than pyproject.toml when that has changed: a second run installs nothing.
EXTRAS_demo := demo
EXTRAS_test := demo,test
EXTRAS_bench := bench
EXTRAS_dev := dev
EXTRAS_cuda := cuda-dev

define install
	@echo "installing fastconv[$(EXTRAS_$*)] into $(@D)"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS_$*)]"
	@touch $@
endef

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.created
	$(install)

$(VENV_CUDA)/.installed-%: pyproject.toml | $(VENV_CUDA)/.created
	$(install)

$(VENV)/.created $(VENV_CUDA)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'fastconv needs Python 3.11 or newer, but PYTHON=$(PYTHON) is' \
	        "$$($(PYTHON) --version 2>&1 || true)."; \
	    echo 'Name another interpreter, for example: make $(MAKECMDGOALS) PYTHON=python3.12'; \
	    exit 1; } >&2
	$(PYTHON) -m venv $(@D)
	@touch $@
