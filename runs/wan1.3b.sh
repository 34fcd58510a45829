#!/usr/bin/env bash
# Wan 1.3B through stages I to III. GPUS=1 (80 GB) or more; on several, dp over clips and cp within.
# Memory and time: aad1 train wan1.3b-aad --dry-run --gpus $GPUS. Every line continues where it was
# interrupted. The data comes first: docs/distilling-wan.md.
set -euo pipefail
GPUS=${GPUS:-1} MESH=${MESH:-} BASE=${BASE:-models/Wan2.1-T2V-1.3B-Diffusers}
for stage in ode dmd aad; do
  torchrun --standalone --nproc-per-node "$GPUS" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
    -m aad1.cli train "wan1.3b-$stage" --teacher "$BASE" --data.base "$BASE" --mesh "$MESH" "$@"
done
