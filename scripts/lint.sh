#!/usr/bin/env bash
# Formatting and clang-tidy over the project's own sources.  Usage: scripts/lint.sh BUILD_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1

git ls-files '*.cpp' '*.hpp' | xargs clang-format-14 --dry-run --Werror
echo "lint: formatting is clean"

# PyPI's clang-tidy takes a third of the time of Debian's, which looks into the system's headers too.
export PATH="$PWD/.venv/bin:$PATH"
tidy() { xargs -P "$(nproc)" -n 1 clang-tidy --quiet -p "$1" 2>/dev/null; }
arm=('kernels/cpu/arm_*.cpp' 'kernels/cpu/neon_*.cpp')
gpu=('src/nccl/*.cpp' 'backends/cudnn_attn/*.cpp' 'backends/flashinfer_attn/*.cpp' 'bench/gpu/*.cpp')
git ls-files 'src/*.cpp' 'kernels/*.cpp' 'backends/*.cpp' "${arm[@]/#/:!}" "${gpu[@]/#/:!}" 'tools/*.cpp' 'examples/*.cpp' 'bench/*.cpp' | tidy "$build"
if [ -f build/neon/compile_commands.json ]; then  # after `make neon`
  git ls-files "${arm[@]}" | tidy build/neon
fi
if [ -d build/cuda/backends/cudnn_attn/CMakeFiles/ditattn_cudnn_attn.dir ] &&
   [ -d build/cuda/backends/flashinfer_attn/CMakeFiles/ditattn_flashinfer_attn.dir ]; then  # after `make cuda`, with their headers
  git ls-files "${gpu[@]}" | tidy build/cuda
fi
echo "lint: clang-tidy is clean"
