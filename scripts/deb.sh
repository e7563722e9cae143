#!/usr/bin/env bash
# Debian packages of a build tree (cmake/debian.cmake).  Usage: scripts/deb.sh BUILD DIRECTORY
set -euo pipefail
umask 022
mkdir -p "$2"
(cd "$1" && cpack --config CPackConfig.cmake -G DEB) >"$1/deb.log" 2>&1 || { cat "$1/deb.log"; exit 1; }
cp "$1"/debian/*.deb "$2"
