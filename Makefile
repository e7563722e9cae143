# The front door. `make demo` and `make test` set up what they need; `make help` lists the rest.
PRESET ?= $(if $(wildcard /dev/nvidia0),cuda,release)
CUDA_SET ?= full
BUILD := build/$(PRESET)
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: $(shell sed -nE 's/^([a-z-]+):.*/\1/p' Makefile)

help: ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## Install what is missing (Debian packages, .venv), nothing else
	@scripts/setup.sh $(filter cuda,$(PRESET))

configure: setup
	@mkdir -p build
	@cmake --preset $(PRESET) $(if $(filter cuda,$(PRESET)),-DDITATTN_CUDA_SET=$(CUDA_SET)) >$(BUILD).configure.log 2>&1 || { cat $(BUILD).configure.log; exit 1; }

build: configure ## Configure and build all (PRESET=release, dev, asan, tsan, cuda)
	@cmake --build $(BUILD)

programs: configure
	@cmake --build $(BUILD) --target ditattn_programs

demo: programs ## The main job: list, compare on real Q/K/V, sample digits with every back end
	@scripts/demo.sh $(BUILD)

test: build ## All tests but the full product
	@ctest --test-dir $(BUILD) --output-on-failure -j 2

test-full: build ## Conformance over the full product of all values (hours; prints progress)
	@$(BUILD)/bin/conformance --full

test-integrations: build ## Tests inside diffusers and others, on the CPU (2 GB from PyPI into .venv-integrations)
	@scripts/test_integrations.sh $(BUILD) $(ARGS)

sanitize: ## Unit, plug-in, fault and CPU kernel tests under the address, undefined-behaviour and thread sanitizers
	@scripts/setup.sh clang
	@scripts/sanitize.sh

fuzz: ## Fuzzers with Clang's libFuzzer (SECONDS_EACH=60; TARGET="safetensors json plugin tensors problems")
	@scripts/setup.sh clang
	@scripts/fuzz.sh $(or $(SECONDS_EACH),60) $(TARGET)

bench-cpu: build ## Library overhead and CPU back ends on model shapes (FILTER=regular expression)
	@$(BUILD)/bin/ditattn_bench --benchmark_min_time=0.2 --benchmark_filter='$(or $(FILTER),.)'

bench-peers: build ## CPU attention beside PyTorch, OpenVINO and ONNX Runtime (downloads them)
	@scripts/bench_peers.sh $(BUILD)

bench-gpu: ## GPU attention beside PyTorch's back ends (needs a GPU, and PYTHON with torch and apache-tvm-ffi; after make cuda)
	@PYTHONPATH=build/cuda/python $(or $(PYTHON),python3) bench/gpu/compare.py

sweep-gpu: ## Other tiles for FLASH_ATTN on Hopper beside the library's (needs a GPU; after make cuda; SHAPES=names or B,H,Sq,Skv,D[,causal])
	@cmake --build build/cuda --target ditattn_gpu_sweep
	@build/cuda/bin/ditattn_gpu_sweep $(SHAPES)

format: ## Format all C++
	@scripts/setup.sh lint
	@git ls-files '*.cpp' '*.hpp' | xargs clang-format-14 -i

lint: ## Formatting and clang-tidy, no changes
	@scripts/setup.sh lint
	@$(MAKE) --no-print-directory build
	@scripts/lint.sh $(BUILD)

docs: ## The public headers as HTML in build/docs/html (Doxygen); what is undocumented is an error
	@scripts/setup.sh docs
	@mkdir -p build
	@doxygen docs/Doxyfile

neon: ## The CPU kernels and their test for 64-bit Arm, cross-built, run under QEMU
	@scripts/setup.sh neon
	@scripts/neon.sh

cuda: setup ## The GPU back ends and their tests, skipped without a GPU (installs nvcc where there is none; CUDA_SET=ci: a kernel of each kind)
	@scripts/setup.sh cuda
	@scripts/cuda.sh $(CUDA_SET)

install: build ## Install to PREFIX (default out/)
	@cmake --install $(BUILD) --prefix $(or $(PREFIX),out)

wheel: setup ## A Python wheel in out/ (CUDA=AUTO: with GPU back ends where there is nvcc; ON, OFF)
	@scripts/wheel.sh out --config-settings=cmake.define.DITATTN_CUDA=$(or $(CUDA),AUTO)

reproducible: setup ## Build twice in different folders; what they install is bit for bit the same (two whole compilations)
	@scripts/reproducible.sh

deb: build ## Debian packages in out/
	@scripts/deb.sh $(BUILD) out

coverage: setup ## Which lines of the CPU code the tests run, by folder; at least 85 %
	@scripts/coverage.sh

clean: ## Remove build products, keep .venv
	@rm -rf build out
