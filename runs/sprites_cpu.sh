#!/usr/bin/env bash
# The method end to end on the drawn world, on a 2-core CPU: teacher, stages I to III.
#   runs/sprites_cpu.sh                the packaged model, about 15 minutes
#   runs/sprites_cpu.sh sprites-tiny   the smallest chain, under 5 minutes (the end-to-end test)
# Each line continues where it was interrupted; models are written to out/<run>/final.
set -euo pipefail
P=${1:-sprites}
aad1 train "$P-teacher"
aad1 train "$P-ode"
aad1 train "$P-dmd"
aad1 train "$P-aad"
aad1 export "out/$P-aad/final" --out "out/$P-model"
