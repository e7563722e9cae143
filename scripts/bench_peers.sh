#!/usr/bin/env bash
# CPU attention beside other libraries, installed into build/peers.  Usage: scripts/bench_peers.sh BUILD_DIR [compare.py's flags]
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
shift
environment=build/peers
if ! "$environment/bin/python" -c 'import onnx, onnxruntime, openvino, torch' 2>/dev/null; then
  echo "bench-peers: making $environment"
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check numpy torch openvino onnxruntime onnx
fi
peers=bench/peers
"$environment/bin/python" "$peers/compare.py" --ceilings "$build/bin/ditattn_ceilings" \
  --worker "ditattn=$build/bin/ditattn_peer_worker" --worker "torch=$peers/torch_worker.py" \
  --worker "openvino=$peers/openvino_worker.py" --worker "onnxruntime=$peers/onnxruntime_worker.py" "$@"
