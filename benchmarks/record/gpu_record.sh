#!/usr/bin/env bash
# Measures on an H200 what the repository records. Each step is one call; the package, vLLM and DeepGEMM must be
# importable:
#
#     benchmarks/record/gpu_record.sh sweep [MODEL...]   calibrate the models, by default all named ones. The shipped
#                                                        table, the recorded rows and the learned policy are made of it.
#                                                        deepseek-v3 in both modes and on both routing distributions,
#                                                        the others as graphs on uniform routing
#     benchmarks/record/gpu_record.sh bench              the scoreboard suite: what calibration chose, and the baselines
#
# Results go to $OUT; state that later calls need goes to $WORK. SECONDS_EACH bounds a call. A later call of sweep or
# bench goes on where the last one stopped; with an empty RESUME, sweep measures everything again. CONFIGS bounds the
# configurations of each backend, the most promising first. Two GPUs can share a sweep: call it with other models and
# another CUDA_VISIBLE_DEVICES; with the same WORK both write one calibration.
set -euo pipefail
cd "$(dirname "$0")/../.."

step="${1:?usage: gpu_record.sh sweep|bench [MODEL...]}"
shift
: "${OUT:=$PWD/out}" "${WORK:=$HOME/.moe_dispatch_record}" "${SECONDS_EACH:=400}" "${CONFIGS:=8}"
: "${FIRST:=deepseek-v3}" "${BENCH:=deepseek-v3 qwen3-30b-a3b mixtral-8x7b}"
: "${TOKENS:=1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192,16384}"
: "${GRAPHS:=graph}" "${RESUME=--resume}"
mkdir -p "$OUT" "$WORK"
export PYTHONUNBUFFERED=1 VLLM_LOGGING_LEVEL=ERROR VLLM_USE_DEEP_GEMM_E8M0=0
export MOE_DISPATCH_CACHE_DIR="$WORK/sweep"
dtypes=(--dtype fp8 --dtype bf16)
moe_dispatch=(python3 -c 'from moe_dispatch.cli import app; app()') # the script of that name need not be on the PATH
benchmarks=(python3 -m moe_dispatch.benchmarks)

left() { echo $((SECONDS_EACH > SECONDS ? SECONDS_EACH - SECONDS : 0)); }
# The timeout is long because a library that loads while another call keeps the cores busy has not hung.
calibrate() { "${moe_dispatch[@]}" calibrate "${dtypes[@]}" --max-configs "$CONFIGS" --timeout 180 "$@"; }
keep() { cp "$1"/calibration/*.json "$OUT/$2"; }

sweep() {
  local models=("$@") others=() model first_s=0
  ((${#models[@]})) || models=(deepseek-v3 qwen3-30b-a3b mixtral-8x7b qwen3-235b kimi-k2-tp8 deepseek-v2-lite gpt-oss-120b)
  for model in "${models[@]}"; do
    if [[ "$model" == "$FIRST" ]]; then
      # Half of the time if other models follow.
      first_s=$((${#models[@]} > 1 ? SECONDS_EACH / 2 : SECONDS_EACH))
    else
      others+=(--model "$model")
    fi
  done
  if ((first_s)); then
    time calibrate --model "$FIRST" --tokens "$TOKENS" --budget "$first_s" $RESUME > "$OUT/sweep-$FIRST.txt"
    tail -n 3 "$OUT/sweep-$FIRST.txt"
  fi
  if ((${#others[@]})); then
    time calibrate "${others[@]}" --tokens "$TOKENS" --mode "$GRAPHS" --routing uniform --budget "$(left)" $RESUME \
      > "$OUT/sweep-${models[-1]}.txt"
    tail -n 3 "$OUT/sweep-${models[-1]}.txt"
  fi
  keep "$WORK/sweep" calibration.json
  # Also under a name of its own, in case two calls had a WORK each.
  keep "$WORK/sweep" "calibration-${models[-1]}.json"
}

bench() {
  local rows="$OUT/bench.jsonl" models=() model
  for model in $BENCH; do models+=(--model "$model"); done
  # --budget stops between points; a single point that outlasts it is interrupted, and its finished rows are kept.
  timeout --signal=INT --kill-after=20 "$((SECONDS_EACH + 5))" "${benchmarks[@]}" run --suite scoreboard \
    "${models[@]}" --out "$rows" --resume --budget "$SECONDS_EACH" || [[ $? =~ ^(124|130)$ ]]
  "${benchmarks[@]}" score "$rows" | tee "$OUT/scoreboard.md" || true
}

case "$step" in
  sweep) sweep "$@" ;;
  bench) bench ;;
  *) echo "gpu_record.sh: unknown step $step; known: sweep, bench" >&2; exit 2 ;;
esac
