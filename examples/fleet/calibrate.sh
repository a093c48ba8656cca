#!/bin/sh
# Calibrate the machine that this runs on, and write the file for every machine with the same hardware.
#
#   docker run --rm --gpus all -v "$PWD/calibrations:/out" IMAGE calibrate.sh /out --model deepseek-v3 --dtype fp8
#
# A GPU is there when a container runs, not when its image is built; so the file is made by a run, and copied into the
# image by the next build (see Dockerfile). It is used under the driver, torch and library versions that it was measured
# with, and retired by others: `moe-dispatch doctor` says so on each machine.
set -eu
out=$1
shift
moe-dispatch calibrate "$@"
moe-dispatch calibration export "$out"
