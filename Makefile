# Needs Python >= 3.10 and make, nothing else: every target sets up its own .venv first.
PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/ready
# Without an NVIDIA GPU: the CPU build of torch (a plain `torch` brings gigabytes of CUDA), and triton for its interpreter.
# With one: the CUDA build, which brings its own triton.
TORCH  := $(shell nvidia-smi -L >/dev/null 2>&1 && echo "torch>=2.9" || echo "torch==2.13.0 triton==3.6.0")
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test soak sanitize check docs bench gates wheel clean

help:            ## this list
	@grep -E '^[a-z]+: .*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

# Threads that spin while they wait slow each other down where cores are shared.
demo: $(READY)   ## the main job: train with standard attention and with Tilewise, measure both, write a report
	OMP_WAIT_POLICY=PASSIVE $(BIN)/tilewise demo

test: $(READY)   ## all tests: on this machine's devices, then the Triton kernels in Triton's interpreter
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal \
	  tests/contract tests/test_interpreter.py tests/test_properties.py tests/test_rng.py tests/test_ops.py tests/test_memory.py tests/test_nonfinite.py \
	  tests/test_varlen.py tests/test_cache_attention.py tests/test_cache_properties.py tests/test_statistics.py \
	  tests/test_tangent_kernels.py tests/test_flash1.py tests/test_traffic_kernels.py \
	  tests/test_compat_flash_attn_kernels.py

soak: $(READY)   ## slow tests, those of `sanitize` among them
	$(PYTEST) -m slow

sanitize: $(READY) ## the CPU kernels under the sanitizers of memory, undefined behaviour and data races
	$(PYTEST) -n 2 --dist worksteal -m slow tests/test_cpu_sanitized.py

check: $(READY)  ## style, types, architecture
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) tests/test_architecture.py

docs: $(READY)   ## write again what README and docs show: output of the code, tables and pictures of results, the gallery
	$(BIN)/python scripts/docs

bench: $(READY)  ## every benchmark of this machine on small shapes, beside its peers, into bench-report/
	OMP_WAIT_POLICY=PASSIVE $(BIN)/tilewise bench all --quick --out bench-report

gates: $(READY)  ## compile every kernel configuration for every GPU whose row in results/gates.json is out of date
	$(BIN)/tilewise inspect --update

wheel: $(READY)  ## build the wheel into dist/
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

clean:           ## remove what these targets made
	rm -rf .venv dist demo-report bench-report .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Tilewise needs Python >= 3.10, this is " + sys.version) if sys.version_info < (3, 10) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[plots,test,check]'
	touch $(READY)
