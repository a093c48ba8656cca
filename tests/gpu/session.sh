#!/usr/bin/env bash
# What is shown of correctness on a lent H200, one step a call; `gpu_record.sh` has the steps that measure:
#
#     tests/gpu/session.sh suite      the gpu suite as it is, then as an A100 and as an L40S, JUnit XML each; then what
#                                          times the host, alone. About 7 minutes on 16 cores: LIMIT bounds each run
#     tests/gpu/session.sh sanitize   compute-sanitizer over a small case of every backend, about 4 minutes. Racecheck
#                                          needs 2026.4 or newer (pip: nvidia-cuda-sanitizer-api 13.5.25, which has it as
#                                          nvidia/cu13/compute-sanitizer/compute-sanitizer: SANITIZER names it); 2025.3
#                                          takes Triton's own hand-over to its partitions for races
#
# The machine is bare and reaches nothing: .gpu/site.tar.xz (the real vLLM and DeepGEMM) travels with the checkout, and
# results go to $OUT. WORKERS run the suite side by side: it compiles for most of its time.
set -euo pipefail
cd "$(dirname "$0")/../.."

step="${1:?usage: session.sh suite|sanitize [arguments]}"
shift
: "${OUT:=$PWD/out}" "${LIMIT:=300}" "${WORKERS:=14}"
FOUND=9 # what compute-sanitizer is to exit with if it finds something
mkdir -p "$OUT" "$HOME/site"
export PYTHONUNBUFFERED=1 VLLM_LOGGING_LEVEL=ERROR VLLM_USE_DEEP_GEMM_E8M0=0

if [[ ! -e "$HOME/site/.unpacked" ]]; then
  tar -C "$HOME/site" -xJf .gpu/site.tar.xz
  python3 -m pip install -q --no-index --no-deps --no-build-isolation .
  touch "$HOME/site/.unpacked"
fi
export PYTHONPATH="$HOME/site"

suite() {
  local failed=0
  # pytest writes its record when it ends, so it is interrupted first and killed only if it does not listen.
  local run=(timeout --signal=INT --kill-after=30 "$LIMIT" python3 -m pytest -m gpu -q -n "$WORKERS" --dist worksteal)
  moe-dispatch doctor --json > "$OUT/machine.json"
  "${run[@]}" --junitxml "$OUT/suite-h200.xml" "$@" || failed=1
  for device in a100 l40s; do
    tests/gpu/as_device.sh "$device" "${run[@]}" --junitxml "$OUT/suite-as-$device.xml" "$@" || failed=1
  done
  python3 -m pytest -m gpu -q -s tests/gpu --junitxml "$OUT/host-overhead.xml" || failed=1
  return "$failed"
}

sanitize() {
  local failed=0 code
  checked memcheck memcheck one_of_each.py "$@" || failed=1
  checked racecheck racecheck one_of_each.py "$@" || failed=1
  # What racecheck is worth: it has nothing to say of a hand-over that is right, and finds one that is wrong.
  checked racecheck-control racecheck racecheck_control.py || failed=1
  for early in written read; do
    code=0
    checked "racecheck-control-early-$early" racecheck racecheck_control.py --early "$early" || code=$?
    ((code == FOUND)) || failed=1
  done
  return "$failed"
}

# `checked LOG TOOL SCRIPT [arguments]` fails with $FOUND if the tool finds something.
checked() {
  local log="$OUT/$1.log"
  timeout 260 "${SANITIZER:-compute-sanitizer}" --tool "$2" --error-exitcode "$FOUND" --log-file "$log" \
    python3 "tests/gpu/$3" "${@:4}"
  local code=$?
  printf '%s: ' "$1"
  tail -n 1 "$log"
  return "$code"
}

case "$step" in
  suite | sanitize) "$step" "$@" ;;
  *) echo "session.sh: no step is called $step" >&2; exit 2 ;;
esac
