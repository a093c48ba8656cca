#!/usr/bin/env bash
# Run a command on this GPU as if it were an older one: tests/gpu/as_device.sh a100 python -m pytest -m gpu
#
# moe_dispatch believes the description of that device, so it makes its choices. Triton lowers for its
# architecture (TRITON_OVERRIDE_ARCH decides the passes up to LLVM IR: no TMA, no wgmma, on sm_80 no e4m3) and emits the
# result for the real one, so that it loads; read in Triton 3.6 and 3.7, backends/nvidia/compiler.py, add_stages.
set -euo pipefail

device="${1:?usage: as_device.sh a100|l40s COMMAND…}"
shift
case "$device" in
  a100) arch=sm80 machine=a100-80gb ;;
  l40s) arch=sm89 machine=l40s ;;
  *) echo "as_device.sh: knows a100 and l40s, got $device" >&2; exit 2 ;;
esac
export MOE_DISPATCH_MACHINE="$machine"
export TRITON_OVERRIDE_ARCH="$arch"
# The cache key holds the architecture, but a cache of its own shows at a glance what was compiled for it.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$HOME/.triton/cache}-$arch"
exec "$@"
