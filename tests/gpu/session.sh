#!/usr/bin/env bash
# Correctness on an H200, one step a call:
#
#     tests/gpu/session.sh suite [pytest arguments]
#         The gpu suite with WORKERS processes, as the H200 that it is, then as an A100 and as an L40S (as_device.sh),
#         then tests/gpu/test_gpu.py alone, because it times the host. Ends within SECONDS_EACH and writes one record of
#         all runs to $OUT/suite.json; the repository keeps that file compressed. DEVICES="h200" leaves the other devices
#         out.
#     tests/gpu/session.sh libraries LABEL
#         The tests of the backends over vLLM and DeepGEMM with the releases in SITE: $OUT/library-conformance-LABEL.json.
#     tests/gpu/session.sh sanitize [one_of_each.py arguments]
#         compute-sanitizer over a small case of every backend, about 4 minutes. SANITIZER names the program. Racecheck
#         needs version 2026.4 or newer (the wheel nvidia-cuda-sanitizer-api 13.5.25 has it as
#         nvidia/cu13/compute-sanitizer/compute-sanitizer): 2025.3 reports races in Triton's own partitions.
#
# benchmarks/record/gpu_record.sh has the steps that measure speed.
#
# The machine need not reach a package registry: SITE, an archive of vLLM and DeepGEMM, travels with the checkout. The
# package is installed from the checkout by every call, because the checkout may have changed since the last one.
set -euo pipefail
cd "$(dirname "$0")/../.."

step="${1:?usage: session.sh suite|libraries|sanitize [arguments]}"
shift
: "${OUT:=$PWD/out}" "${SECONDS_EACH:=530}" "${WORKERS:=14}" "${DEVICES:=h200 a100 l40s}" "${SITE:=.gpu/site.tar.xz}"
: "${HOST_SECONDS:=40}" # kept for the tests that time the host
FINDINGS=9              # exit status that compute-sanitizer uses if it reports something
site="$HOME/$(basename "$SITE" .tar.xz)"
mkdir -p "$OUT" "$site"
export PYTHONUNBUFFERED=1 VLLM_LOGGING_LEVEL=ERROR VLLM_USE_DEEP_GEMM_E8M0=0

if [[ ! -e "$site/.unpacked" ]]; then
  tar -C "$site" -xJf "$SITE"
  touch "$site/.unpacked"
fi
python3 -m pip install -q --no-index --no-deps --no-build-isolation .
export PYTHONPATH="$site"

suite() {
  local failed=0 device wrapper reports=()
  for device in $DEVICES; do
    wrapper=()
    [[ "$device" == h200 ]] || wrapper=(tests/gpu/as_device.sh "$device")
    tests "$device" "$((SECONDS_EACH - SECONDS - HOST_SECONDS))" "${wrapper[@]}" \
      python3 -m pytest -m gpu -q -n "$WORKERS" --dist worksteal "$@" || failed=1
  done
  tests host "$((SECONDS_EACH - SECONDS))" python3 -m pytest -m gpu -q -s tests/gpu/test_gpu.py || failed=1
  python3 tests/gpu/suite_record.py "${reports[@]}" --out "$OUT/suite.json"
  return "$failed"
}

libraries() {
  local label="${1:?usage: session.sh libraries LABEL}" failed=0 reports=()
  export DG_JIT_CACHE_DIR="$HOME/.cache/deep_gemm-$label" # kernels of another release must not be found
  tests "$label" "$SECONDS_EACH" python3 -m pytest -m gpu -q -n "$WORKERS" --dist worksteal \
    -k "vllm_fused_moe or deep_gemm" tests/backends/test_conformance.py tests/backends/test_vllm_fused_moe.py \
    tests/gpu/test_faults.py tests/gpu/test_libraries.py || failed=1
  python3 tests/gpu/suite_record.py "${reports[@]}" --out "$OUT/library-conformance-$label.json"
  return "$failed"
}

# `tests NAME SECONDS COMMAND…` runs pytest for so many seconds at most. Its JUnit report joins $reports, with the option
# that says so if it was interrupted.
tests() {
  local name="$1" seconds="$2" report code=0
  shift 2
  ((seconds > 10)) || { echo "session.sh: no time is left for $name" >&2; return 1; }
  report="$(mktemp -d)/$name.xml"
  reports+=("$report")
  # pytest writes its report when it ends, so it is interrupted first, and killed only if it does not end then.
  timeout --signal=INT --kill-after=20 "$seconds" "$@" --junitxml "$report" || code=$?
  ((code <= 1)) || reports+=(--interrupted "$name") # pytest ends with 1 if a test failed
  return "$code"
}

sanitize() {
  local failed=0 code early
  checked memcheck memcheck one_of_each.py "$@" || failed=1
  checked racecheck racecheck one_of_each.py "$@" || failed=1
  # A control of racecheck itself: it must report nothing for a correct hand-over, and must report both wrong ones.
  checked racecheck-control racecheck racecheck_control.py || failed=1
  for early in written read; do
    code=0
    checked "racecheck-control-early-$early" racecheck racecheck_control.py --early "$early" || code=$?
    ((code == FINDINGS)) || failed=1
  done
  return "$failed"
}

# `checked LOG TOOL SCRIPT [arguments]` returns $FINDINGS if the tool reports something.
checked() {
  local log="$OUT/$1.log" code=0
  timeout 260 "${SANITIZER:-compute-sanitizer}" --tool "$2" --error-exitcode "$FINDINGS" --log-file "$log" \
    python3 "tests/gpu/$3" "${@:4}" || code=$?
  printf '%s: ' "$1"
  tail -n 1 "$log"
  return "$code"
}

case "$step" in
  suite | libraries | sanitize) "$step" "$@" ;;
  *) echo "session.sh: unknown step $step; known: suite, libraries, sanitize" >&2; exit 2 ;;
esac
