#!/usr/bin/env bash
# Formatting and clang-tidy over the project's own sources.  Usage: scripts/lint.sh BUILD_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1

git ls-files '*.cpp' '*.hpp' | xargs clang-format-14 --dry-run --Werror
echo "lint: formatting is clean"

# clang 14 reads the compilation database; sources of tests are linted as the library's are.
arm=('kernels/cpu/arm_*.cpp' 'kernels/cpu/neon_*.cpp')
gpu=('src/nccl/*.cpp' 'backends/cudnn_attn/*.cpp' 'backends/flashinfer_attn/*.cpp' 'bench/gpu/*.cpp')
git ls-files 'src/*.cpp' 'kernels/*.cpp' 'backends/*.cpp' "${arm[@]/#/:!}" "${gpu[@]/#/:!}" 'tools/*.cpp' 'examples/*.cpp' 'bench/*.cpp' |
  xargs -P "$(nproc)" -n 4 clang-tidy-14 --quiet -p "$build" 2>/dev/null
if [ -f build/neon/compile_commands.json ]; then  # after `make neon`
  git ls-files "${arm[@]}" | xargs clang-tidy-14 --quiet -p build/neon 2>/dev/null
fi
if [ -d build/cuda/backends/cudnn_attn/CMakeFiles/ditattn_cudnn_attn.dir ] &&
   [ -d build/cuda/backends/flashinfer_attn/CMakeFiles/ditattn_flashinfer_attn.dir ]; then  # after `make cuda`, with their headers
  git ls-files "${gpu[@]}" | xargs clang-tidy-14 --quiet -p build/cuda 2>/dev/null
fi
echo "lint: clang-tidy is clean"
