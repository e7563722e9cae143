#!/usr/bin/env bash
# Builds the fuzzers and runs each, or those named, for so many seconds, from the seeds in the tree and from what earlier
# runs found (build/fuzz/corpus). Stops at the first finding: its input lies in build/fuzz/found. With SEED and RUNS, a run
# goes the same way each time, as far as RUNS inputs.
# Usage: [SEED=0] [RUNS=-1] scripts/fuzz.sh SECONDS [TARGET…]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
seconds=$1
targets=("${@:2}")
[ ${#targets[@]} -gt 0 ] || targets=(safetensors json plugin tensors problems)

mkdir -p build
cmake --preset asan >build/asan.configure.log 2>&1 || { cat build/asan.configure.log; exit 1; }
cmake --build build/asan --target fuzzers

TMPDIR=$(mktemp -d)  # the fuzzers' files
trap 'rm -rf "$TMPDIR"' EXIT
export TMPDIR DITATTN_TUNE=off
mkdir -p build/fuzz/found
for target in "${targets[@]}"; do
  seeds=tests/fuzz/corpus/$target
  [ -d "$seeds" ] || { echo "fuzz: no fuzzer '$target'. There are: $(ls tests/fuzz/corpus | xargs)" >&2; exit 1; }
  mkdir -p "build/fuzz/corpus/$target"
  options=(-max_total_time="$seconds" -timeout=25 -rss_limit_mb=2560 -max_len=1500 -print_final_stats=1 -seed="${SEED:-0}" -runs="${RUNS:--1}"
           -artifact_prefix="build/fuzz/found/$target-")
  [ -e "tests/fuzz/$target.dict" ] && options+=(-dict="tests/fuzz/$target.dict")
  log=build/fuzz/$target.log
  if ! build/asan/bin/fuzz_"$target" "${options[@]}" "build/fuzz/corpus/$target" "$seeds" >"$log" 2>&1; then
    grep -vE '^#[0-9]+' "$log" >&2
    echo "fuzz: $target has found something; run it again: build/asan/bin/fuzz_$target build/fuzz/found/$target-…" >&2
    exit 1
  fi
  echo "$target: $(grep -E '^#[0-9]+.*DONE' "$log" | tail -1)"
done
