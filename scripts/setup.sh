#!/usr/bin/env bash
# Installs what is missing and nothing else: Debian packages (scripts/packages*.txt) and the Python environment.
# A second run finds everything there and touches no network.  Usage: scripts/setup.sh [lint|neon|cuda]
set -euo pipefail
cd "$(dirname "$0")/.."

lists=(scripts/packages.txt)
[ $# -gt 0 ] && [ -e "scripts/packages-$1.txt" ] && lists+=("scripts/packages-$1.txt")

missing=()
while read -r package; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done < <(cat "${lists[@]}")

if [ ${#missing[@]} -gt 0 ]; then
  install="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
  if [ "$(id -u)" -eq 0 ]; then
    echo "setup: installing ${missing[*]}"
    DEBIAN_FRONTEND=noninteractive bash -c "$install" >/dev/null
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    echo "setup: installing ${missing[*]} (with sudo)"
    sudo DEBIAN_FRONTEND=noninteractive bash -c "$install" >/dev/null
  else
    echo "setup: these Debian packages are missing, and this user may not install them. Run once, as root:" >&2
    echo "  $install" >&2
    exit 1
  fi
fi

# The stamp holds the requirements that the environment was made from.
if ! cmp -s requirements.txt .venv/requirements.stamp; then
  echo "setup: making .venv from requirements.txt"
  rm -rf .venv
  python3 -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/requirements.stamp
fi

# nvcc from PyPI where there is no toolkit.
if [ "${1:-}" = cuda ] && ! PATH=$PATH:/usr/local/cuda/bin command -v nvcc >/dev/null &&
  ! cmp -s requirements-cuda.txt .venv/requirements-cuda.stamp; then
  echo "setup: installing nvcc into .venv from requirements-cuda.txt"
  .venv/bin/pip install --quiet --disable-pip-version-check -r requirements-cuda.txt
  cp requirements-cuda.txt .venv/requirements-cuda.stamp
fi
