#!/usr/bin/env bash
# The packaged doom model, from nothing: data, codec, teacher, stages I to III, export.
# One GPU; needs the extra `doom` (ViZDoom). Every line continues where it was interrupted.
set -euo pipefail
CLIPS=${CLIPS:-6000} WORKERS=${WORKERS:-16} CODEC_MINUTES=${CODEC_MINUTES:-0} TEACHER_MINUTES=${TEACHER_MINUTES:-9.5}
aad1 data doom --split heldout --clips 256 --seed 1 --workers "$WORKERS" --out out/data/doom-heldout
aad1 data doom --split train --clips "$CLIPS" --workers "$WORKERS" --out out/data/doom
# CODEC_MINUTES=0 takes the packaged codec. That one was trained by the first line below (2.4 minutes), its decoder then
# twice on a CPU, the second time as in the second line (docs/log.md). Latents are those of the first line, to the bit.
if [ "$CODEC_MINUTES" != 0 ]; then
  clips="--data out/data/doom --heldout out/data/doom-heldout --compile"
  python runs/train_codec.py $clips --out out/doom-codec-soft --minutes "$CODEC_MINUTES" --texture 0.15
  python runs/train_codec.py $clips --out out/doom-codec --init out/doom-codec-soft --decoder-only --refine 8 \
    --texture 0 --subbands 0.8 --lr 4e-4 --minutes 3
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
