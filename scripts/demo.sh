#!/usr/bin/env bash
# The main job: which back ends there are, a real model sampled with each, and how fast and how exact they are on real and
# on model-sized inputs, as tables and as a page with that picture.  Usage: scripts/demo.sh BUILD_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1/bin
out=out/demo
mkdir -p "$out"

echo "== Back ends"
"$bin/ditattn" list

echo
echo "== Digits from one seed with every available back end of the CPU"
backends=$("$bin/ditattn" list --json |
  .venv/bin/python -c 'import json, sys; print(" ".join("--backend " + b["name"] for b in json.load(sys.stdin)["backends"] if b["available"] and "cpu" in b["devices"]))')
# shellcheck disable=SC2086  # one word per flag
"$bin/digits" $backends --seed 1 --count 20 --out "$out/digits.png" --samples "$out/digits.safetensors"
picture=(--picture "Digits from one seed with every back end of the CPU=$out/digits.png")

echo
echo "== Q/K/V captured from a real diffusion transformer, and two model shapes (DiT-XL/2 at 512 px, SD 3 at 512 px)"
"$bin/ditattn" compare --input examples/digits/capture.safetensors \
  --shape 2,16,1024,1024,72 --shape 2,24,1024,1024,64 --report "$out/compare.html" "${picture[@]}"

if "$bin/ditattn" doctor | grep -qE '^cuda +yes +yes'; then
  echo
  echo "== The same on the GPU in float16, and FLUX.1 at 1024 px"
  "$bin/ditattn" compare --device cuda --dtype float16 --input examples/digits/capture.safetensors \
    --shape 2,16,1024,1024,72 --shape 2,24,1024,1024,64 --shape 1,24,4608,4608,128 --report "$out/compare-gpu.html" \
    "${picture[@]}"
fi

echo
echo "Report:  $(ls "$out"/compare*.html | xargs)"
echo "Picture: $out/digits.png"
echo "Samples: $out/digits-NAME.safetensors (score one: .venv/bin/python examples/digits/score.py FILE)"
