#!/usr/bin/env bash
# A wheel of this source tree, with the manylinux tag that fits it. Touches no network: .venv has what it takes.
# Usage: scripts/wheel.sh DIRECTORY [pip option…]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH
directory=$1
shift

built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
pip wheel . --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --check-build-dependencies \
  --wheel-dir "$built" "$@"
auditwheel repair --exclude libtvm_ffi.so --wheel-dir "$directory" "$built"/*.whl
