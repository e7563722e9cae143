#!/usr/bin/env bash
# Installs what is missing and nothing else: Debian packages (scripts/packages*.txt) and the Python environment.
# A second run finds everything there and touches no network.  Usage: scripts/setup.sh [lint|docs|neon|clang|cuda|mpi]
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

# Installs a list of requirements into .venv once: the stamp holds what was installed.  Usage: require LIST [pip option…]
require() {
  cmp -s "$1" ".venv/$1.stamp" && return
  echo "setup: installing $1 into .venv"
  .venv/bin/pip install --quiet --disable-pip-version-check "${@:2}" -r "$1"
  cp "$1" ".venv/$1.stamp"
}

if ! cmp -s requirements.txt .venv/requirements.txt.stamp; then
  rm -rf .venv
  python3 -m venv .venv
  require requirements.txt
fi
[ "${1:-}" = lint ] && require requirements-lint.txt
if [ "${1:-}" = cuda ]; then
  require requirements-cuda.txt --no-deps
  PATH=$PATH:/usr/local/cuda/bin command -v nvcc >/dev/null || require requirements-nvcc.txt
  ls /usr/include/nccl.h /usr/local/include/nccl.h /usr/local/cuda/include/nccl.h >/dev/null 2>&1 || require requirements-nccl.txt --no-deps
fi
