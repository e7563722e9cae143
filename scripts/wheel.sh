#!/usr/bin/env bash
# A wheel of this source tree, with the manylinux tag that fits it. Touches no network: .venv has what it takes.
# Usage: scripts/wheel.sh DIRECTORY [pip option…]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH
directory=$1
shift

# The files' times in it: the commit's, or a constant where there is no commit.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 1700000000)}
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
pip wheel . --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --check-build-dependencies \
  --wheel-dir "$built" "$@"
auditwheel repair --exclude libtvm_ffi.so --wheel-dir "$directory" "$built"/*.whl
