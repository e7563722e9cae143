#!/usr/bin/env bash
# Tests inside diffusers and others, in an environment of their own that is made once.
# Usage: scripts/test_integrations.sh BUILD_DIR [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
shift
environment=.venv-integrations
lists=(requirements-integrations.txt requirements-vllm-omni.txt)
if ! cat "${lists[@]}" | cmp -s - "$environment/requirements.stamp"; then
  echo "test-integrations: making $environment"
  python3 -m venv --clear "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check -r "${lists[0]}"
  "$environment/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "${lists[1]}"
  cat "${lists[@]}" >"$environment/requirements.stamp"
fi
export PYTHONPATH="$PWD/$build/python" PYTHONDONTWRITEBYTECODE=1
exec "$environment/bin/python" -m pytest -q -p no:cacheprovider tests/integrations "$@"
