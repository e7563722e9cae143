#!/usr/bin/env bash
# Which lines of the CPU code the unit, plug-in, kernel, conformance and command-line tests run, by folder; fails below
# 85 %. gcovr comes from PyPI, in an environment of its own. The report with every line is build/coverage/lines.html.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
build=build/coverage

cmake --preset coverage >"build/coverage.configure.log" 2>&1 || { cat build/coverage.configure.log; exit 1; }
tests=$(sed -n 's/^ditattn_add_test(\(unit_[a-z_]*\).*/\1/p' tests/unit/CMakeLists.txt)
# shellcheck disable=SC2086
cmake --build $build --target $tests abi_plugins kernels_cpu conformance ditattn_cli cli_test_plugin cli_remedies cli_ceilings
[ -x $build/gcovr/bin/gcovr ] || { python3 -m venv $build/gcovr && $build/gcovr/bin/pip install --quiet 'gcovr==8.8'; }

find $build -name '*.gcda' -delete
ctest --test-dir $build --output-on-failure -j 2 -L 'unit|abi|cli|conformance' -E 'conformance.tiled|oracle_agrees|Memory\.|Guard.QuantizedBackEnds'
# Fewer random problems, and none of the tests that only tell figures.
$build/bin/kernels_cpu --problems=1 --gtest_brief=1 '--gtest_filter=-Sage3.ErrorAgainst*:Sage3.ArithmeticAgainst*'

$build/gcovr/bin/gcovr --root . --object-directory $build --gcov-ignore-parse-errors=all \
  --filter 'src/' --filter 'backends/' --filter 'kernels/cpu/' --filter 'tools/' --filter 'include/' \
  --merge-mode-functions=separate --json-summary $build/summary.json --html-details $build/lines.html >$build/gcovr.log
python3 scripts/coverage_by_folder.py $build/summary.json 85
