# make demo | make test | make bench: each creates .venv if there is none, installs what is missing (torch first), then runs.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
export CMAKE_ARGS := -DLLADA_KERNELS_WERROR=ON $(CMAKE_ARGS)
CLANG_FORMAT_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: demo test bench lint install aarch64 cuda gpu-dry-run clean

demo: install
	$(BIN)/llada-kernels demo $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

# Everything is installed without build isolation, so torch is downloaded once and rebuilds compile only what changed.
install: $(VENV)/installed
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q "setuptools>=77" "pybind11>=2.13" cmake ninja
	$(BIN)/pip install -q --no-build-isolation -e ".[test]"
	touch $@

# Measures all there is and rewrites docs/performance.md; ARGS=--quick only sees whether everything works.
bench: install
	$(BIN)/python -m bench $(ARGS)

lint: install
	$(BIN)/pip install -q "ruff==0.17.5" "clang-format==18.1.8" mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMAT_FILES)
	$(BIN)/mypy
	$(BIN)/lint-imports

# The CPU kernels must also build for 64-bit Arm. Needs aarch64-linux-gnu-g++.
aarch64:
	cmake -S . -B build/aarch64 -DLLADA_KERNELS_KERNELS_ONLY=ON $(CMAKE_ARGS) -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_BUILD_TYPE=Release
	cmake --build build/aarch64 -j 2

# The CUDA kernels: compiled for sm_80 and sm_90a, an error if one spills registers; then the package that holds them must load and work
# without a GPU, with the torch of $(VENV).
CUDA_OPS := threshold_unmask moe_routing rms_norm rope
cuda: install
	rm -rf build/cuda
	LLADA_KERNELS_CUDA=on LLADA_KERNELS_BUILD_DIR=$(CURDIR)/build/cmake-cuda CMAKE_ARGS="$(CMAKE_ARGS) -DLLADA_KERNELS_FAIL_ON_SPILLS=ON" \
	  $(abspath $(BIN))/python setup.py -q build --build-lib build/cuda
	cp -r python_tests pyproject.toml build/cuda
	cd build/cuda && $(abspath $(BIN))/python -m llada_kernels.info | grep "CUDA kernels for sm_80, sm_90a, compute_90: moe_routing"
	cd build/cuda && $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider -m "not gpu" -k "not emulated" \
	  $(CUDA_OPS:%=python_tests/ops/test_%.py)

# The script for machines with a GPU, every line of it with tiny shapes, Triton kernels in the interpreter.
gpu-dry-run: install
	PYTHON=$(BIN)/python bench/gpu.sh all --dry-run build/gpu-dry-run

clean:
	rm -rf build dist *.egg-info llada_kernels/*.so
