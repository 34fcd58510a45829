#!/usr/bin/env bash
# The packaged doom model, from nothing: data, codec, teacher, stages I to III, export.
# One GPU; needs the extra `doom` (ViZDoom). Every line continues where it was interrupted.
set -euo pipefail
# shellcheck disable=SC2086
CLIPS=${CLIPS:-6000} WORKERS=${WORKERS:-16} CODEC_MINUTES=${CODEC_MINUTES:-2.5}
aad1 data doom --split heldout --clips 256 --seed 1 --workers "$WORKERS" --out out/data/doom-heldout
aad1 data doom --split train --clips "$CLIPS" --workers "$WORKERS" --out out/data/doom
python runs/train_codec.py --data out/data/doom --heldout out/data/doom-heldout --out out/doom-codec --minutes "$CODEC_MINUTES" --texture 0.15 --compile
aad1 encode out/data/doom-heldout --codec out/doom-codec --out out/data/doom-heldout-latents
aad1 encode out/data/doom --codec out/doom-codec --out out/data/doom-latents
aad1 train doom-teacher --max-minutes 6
aad1 train doom-ode
aad1 train doom-dmd
aad1 train doom-aad
aad1 export out/doom-aad/final --out src/aad1/packaged/doom
