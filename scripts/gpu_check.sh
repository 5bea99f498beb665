#!/usr/bin/env bash
# scripts/gpu_check.sh OUT: on a machine with a GPU, torch and triton, without network: install this tree, run the
# tests that need the GPU, compile every kernel ahead of time, run the bench. Everything goes to the folder OUT:
# tests.log, aot.log, cuda.json. Takes less than ten minutes.
set -uo pipefail
out=${1:?usage: scripts/gpu_check.sh OUT}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONUNBUFFERED=1
status=0
step() {
  local log=$1 limit=$2
  shift 2
  echo "== $*"
  timeout "$limit" "$@" 2>&1 | tee "$out/$log" | tail -n 40 || { status=1; echo "FAILED: $*"; }
}
step install.log 120 python3 -m pip install --no-index --no-deps --no-build-isolation --editable .
step info.log 60 python3 -m ttt info
step tests.log 240 python3 -m pytest -q tests/gpu tests/ops/test_triton.py
step aot.log 60 python3 -m ttt.ops.triton.aot
step bench.log 240 python3 -m bench.run --device cuda --suite commit,decode,observe --json "$out/cuda.json"
exit $status
