#!/usr/bin/env bash
# Runs everything that needs a GPU, without a network and in less than ten minutes: scripts/gpu_check.sh OUT [SECONDS]
# It installs this tree, runs the tests that need the GPU and runs the benches. The machine needs a GPU, torch and triton.
# The folder OUT then holds install.log, tests.log, bench.log and cuda.json, which has the form of the files in
# bench/kernels/results.
# What matters most comes first, and every step's end is in its log when it ends. If a step fails or takes too long, the
# next ones still run, and the exit status is 1. After SECONDS (570) nothing is started or left running.
set -u
out=${1:?usage: scripts/gpu_check.sh OUT [SECONDS]}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
parts=build/gpu_check
rm -rf "$parts"
mkdir -p "$parts"
export PYTHONUNBUFFERED=1
export TORCHINDUCTOR_COMPILE_THREADS=1 # its pool of processes would keep a bench from ending
end=$((${2:-570} - 15)) # the rest is for joining the results
failed=()

# step LOG SECONDS COMMAND...: append the output to LOG, show its last lines, and remember a failure.
step() {
  local log=$out/$1 limit=$2 code lines
  shift 2
  ((limit = limit < end - SECONDS ? limit : end - SECONDS))
  echo "== $* (at $SECONDS s)" | tee -a "$log"
  lines=$(wc -l <"$log")
  if ((limit > 0)); then
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
    code=$?
  else
    code=124
  fi
  tail -n "+$((lines + 1))" "$log" | tail -n 12
  if ((code)); then
    failed+=("$* (exit $code)")
    echo "FAILED: $* (exit $code; 124: out of time)" | tee -a "$log"
  fi
}

rm -f "$out"/{install,tests,bench}.log "$out/cuda.json"
# Without a compiler, pybind11 or ninja this installs no C++ kernels, and `ttt info` says why. If it fails altogether,
# everything below still runs from the tree.
step install.log 90 python3 -m pip install --no-index --no-deps --no-build-isolation --editable .
step install.log 20 python3 -m ttt info

workers=()
python3 -c "import xdist" 2>/dev/null && workers=(-n "$(($(nproc) < 16 ? $(nproc) : 14))")
step tests.log 150 python3 -m pytest "${workers[@]}" tests/gpu tests/ops/test_window_step.py tests/ops/test_momentum.py \
  tests/ops/test_replay_rows.py tests/ops/sequence/test_delta_rule_triton.py tests/ops/sequence/test_memory_triton.py \
  tests/ops/test_triton.py tests/ops/test_append.py \
  tests/ops/test_project.py tests/ops/test_reservoir.py tests/ops/test_low_rank_triton.py tests/ops/test_low_rank_compress_triton.py

suites=(decode commit window_linear low_rank observe generate head sequence)
limits=(60 60 35 40 50 25 20 40)
results=()
for at in "${!suites[@]}"; do
  suite=${suites[at]}
  results+=("$parts/$suite.json")
  step bench.log "${limits[at]}" python3 -m bench.kernels.run --device cuda --suite "$suite" --rounds 5 --seconds 1 --json "$parts/$suite.json"
done
end=$((end + 15))
step bench.log 15 python3 -m bench.kernels.merge "$out/cuda.json" "${results[@]}"

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed in $SECONDS s"
