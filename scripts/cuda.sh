#!/usr/bin/env bash
# The GPU back ends and their tests, which are skipped, and counted, where there is no GPU.  Usage: scripts/cuda.sh full|ci
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/cuda

mkdir -p build
cmake --preset cuda -DDITATTN_CUDA_SET="$1" >"$build.configure.log" 2>&1 || { cat "$build.configure.log"; exit 1; }
cmake --build "$build" --target ditattn_programs ditattn_python conformance cuda | tee "$build.build.log"
if grep -E 'C75(1[0-9]|20)' "$build.build.log"; then
  echo "cuda: ptxas serializes a kernel's products, which halves its speed (docs/kernels/flash_sm90.md): change its tile" >&2
  exit 1
fi
ctest --test-dir "$build" --output-on-failure -L cuda
