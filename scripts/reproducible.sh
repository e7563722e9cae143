#!/usr/bin/env bash
# Builds the committed tree twice, in folders of different names and lengths, one after the other and without ccache, and
# compares what the two install bit for bit. CPU programs and back ends only. Takes two whole compilations.
# Usage: scripts/reproducible.sh [cmake option…]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s .venv/bin/python)
commit=$(git rev-parse HEAD) # the same for both
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() { # FOLDER, cmake option…
  local folder=$1
  shift
  mkdir -p "$folder"
  git archive "$commit" | tar -x -m -C "$folder" # -m: files of now, not of the commit
  cmake -S "$folder" -B "$folder/build" -G Ninja -DPython_EXECUTABLE="$python" -DCMAKE_BUILD_TYPE=Release \
    -DDITATTN_CCACHE=OFF -DDITATTN_CUDA=OFF -DDITATTN_BUILD_TESTS=OFF -DDITATTN_BUILD_BENCH=OFF \
    -DDITATTN_BUILD_EXAMPLES=OFF "$@" >"$folder.log" 2>&1 || { cat "$folder.log"; return 1; }
  cmake --build "$folder/build" >"$folder.log" 2>&1 || { cat "$folder.log"; return 1; }
  cmake --install "$folder/build" --prefix "$folder/installed" >/dev/null
}

first=$work/a
second=$work/another/place
mkdir -p "$work/another"
(umask 022 && TZ=UTC build "$first" "$@")
(umask 022 && TZ=Asia/Tokyo LC_ALL=C build "$second" "$@")

status=0
for folder in "$first" "$second"; do
  (cd "$folder/installed" && find . -printf '%P %M %l\n' | LC_ALL=C sort) >"$folder.list"
  if grep -rlF -e "$work" "$folder/installed"; then
    echo "^ names the folder it was built in"
    status=1
  fi
done
diff "$first.list" "$second.list" || { echo "^ names, modes or links differ"; status=1; }
while IFS= read -r -d '' file; do
  cmp "$first/installed/$file" "$second/installed/$file" || status=1
done < <(cd "$first/installed" && find . -type f -print0 | LC_ALL=C sort -z)
[ $status -ne 0 ] || echo "$(find "$first/installed" -type f | wc -l) installed files, bit for bit the same in both builds"
exit $status
