#!/usr/bin/env bash
# The packaged doom model, from nothing: data, codec, teacher, stages I to III, export.
# One GPU; needs the extra `doom` (ViZDoom). Every line continues where it was interrupted.
set -euo pipefail
CLIPS=${CLIPS:-6000} WORKERS=${WORKERS:-16} CODEC_MINUTES=${CODEC_MINUTES:-0} TEACHER_MINUTES=${TEACHER_MINUTES:-9.5}
aad1 data doom --split heldout --clips 256 --seed 1 --workers "$WORKERS" --out out/data/doom-heldout
aad1 data doom --split train --clips "$CLIPS" --workers "$WORKERS" --out out/data/doom
# CODEC_MINUTES=0 takes the packaged codec. The line below trained it (2.4 minutes); its decoder was then tuned for
# sharpness on a CPU and blended half and half (train_codec.py --init --freeze-encoder --blend; docs/log.md has the figures).
if [ "$CODEC_MINUTES" != 0 ]; then
  python runs/train_codec.py --data out/data/doom --heldout out/data/doom-heldout --out out/doom-codec --minutes "$CODEC_MINUTES" --texture 0.15 --compile
else
  mkdir -p out && cp -rT src/aad1/packaged/doom/codec out/doom-codec
fi
aad1 encode out/data/doom-heldout --codec out/doom-codec --out out/data/doom-heldout-latents
aad1 encode out/data/doom --codec out/doom-codec --out out/data/doom-latents
aad1 train doom-teacher --max-minutes "$TEACHER_MINUTES"
aad1 train doom-ode
aad1 train doom-dmd
aad1 train doom-aad
aad1 export out/doom-aad/final --out src/aad1/packaged/doom
# The monitor showed the first 64 held-out clips in training, so they are left out.
aad1 evaluate --model out/doom-aad/final --data out/data/doom-heldout --skip 64 --out out/doom-evaluation
