#!/usr/bin/env bash
# kernels/cpu and its test cross-built for 64-bit Arm, and run under QEMU.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/neon

mkdir -p build
cmake --preset neon >"$build.configure.log" 2>&1 || { cat "$build.configure.log"; exit 1; }
cmake --build "$build"
ctest --test-dir "$build" --output-on-failure -j 2
grep '^worst error of' "$build/Testing/Temporary/LastTest.log"
