#!/usr/bin/env bash
# Unit, plug-in, fault and CPU kernel tests under sanitizers: address and undefined behaviour, then threads.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
export TSAN_OPTIONS="suppressions=$PWD/tests/tsan_suppressions.txt"

targets=(unit_core unit_guard unit_parallel unit_planner unit_registry unit_selector unit_tuner unit_seed_examples unit_models
         abi_plugins kernels_cpu faults_allocations faults_fork faults_load)
for preset in asan tsan; do
  [ "$preset" = asan ] && more=(unit_core_rows) || more=()  # which has one thread
  cmake --preset "$preset" >"build/$preset.configure.log" 2>&1 || { cat "build/$preset.configure.log"; exit 1; }
  cmake --build "build/$preset" --target "${targets[@]}" "${more[@]}"
  ctest --test-dir "build/$preset" --output-on-failure -j 2 -L 'unit|abi|faults|kernels'
done
