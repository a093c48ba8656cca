#!/usr/bin/env bash
# What is run on a lent H200, one step a call, each within 9 minutes:
#
#     benchmarks/gpu_session.sh suite|bench|claims|calibrate|sanitize [arguments of the step's command]
#
# The machine is bare and reaches nothing: .gpu/site.tar.xz (the real vLLM and DeepGEMM) travels with the checkout, and
# results go to $OUT, which brings back at most 8 files.
set -euo pipefail
cd "$(dirname "$0")/.."

step="${1:?usage: gpu_session.sh suite|bench|claims|calibrate|sanitize [arguments]}"
shift
: "${OUT:=$PWD/out}"
mkdir -p "$OUT" "$HOME/site"
export PYTHONUNBUFFERED=1 VLLM_LOGGING_LEVEL=ERROR VLLM_USE_DEEP_GEMM_E8M0=0

if [[ ! -e "$HOME/site/.unpacked" ]]; then
  tar -C "$HOME/site" -xJf .gpu/site.tar.xz
  # Editable: from the checkout's root a plain install would be shadowed by moe_dispatch/ without its backends.
  python3 -m pip install -q --no-index --no-deps --no-build-isolation -e .
  touch "$HOME/site/.unpacked"
fi
export PYTHONPATH="$HOME/site"

suite() {
  local failed=0
  moe-dispatch doctor --json > "$OUT/machine.json"
  python3 -m pytest -m gpu -q --junitxml "$OUT/suite-h200.xml" "$@" || failed=1
  for device in a100 l40s; do
    benchmarks/as_device.sh "$device" python3 -m pytest -m gpu -q --junitxml "$OUT/suite-as-$device.xml" "$@" || failed=1
  done
  return "$failed"
}

bench() {
  local rows="$OUT/bench.jsonl"
  # Rows of an earlier call, brought along in .gpu/, are gone on with.
  [[ -e "$rows" || ! -e .gpu/bench.jsonl ]] || cp .gpu/bench.jsonl "$rows"
  local status=0
  # --budget stops between points; a single point that outlasts it is interrupted, and its finished rows are kept.
  timeout --signal=INT --kill-after=20 520 moe-dispatch bench --tokens 1,4,16,64,256,1024,4096,16384 --mode graph \
    --config all --budget 480 --resume --out "$rows" "$@" || status=$?
  [[ "$status" =~ ^(0|124|130)$ ]] || return "$status"
  python3 benchmarks/scoreboard.py "$rows" | tee "$OUT/scoreboard.md" || true
}

claims() {
  timeout 520 python3 benchmarks/claims.py --out "$OUT/claims.jsonl" "$@" | tee "$OUT/claims.md"
}

calibrate() {
  MOE_DISPATCH_CACHE_DIR="$OUT/calibration" moe-dispatch calibrate --model deepseek-v3 --dtype fp8 --dtype bf16 "$@"
}

sanitize() {
  local failed=0
  for tool in memcheck racecheck; do
    timeout 260 compute-sanitizer --tool "$tool" --error-exitcode 9 --log-file "$OUT/$tool.log" \
      python3 benchmarks/one_of_each.py "$@" || failed=1
    tail -n 3 "$OUT/$tool.log"
  done
  return "$failed"
}

case "$step" in
  suite | bench | claims | calibrate | sanitize) "$step" "$@" ;;
  *) echo "gpu_session.sh: no step is called $step" >&2; exit 2 ;;
esac
