#!/usr/bin/env bash
# The experiments of docs/evidence.md on the drawn world, one run after another, resumable:
#   runs/evidence.sh --minutes 25                 the next runs that fit, in the plan's order
#   runs/evidence.sh --list                       all runs and which are done
#   runs/evidence.sh --label low --override aad.optim.lr=1e-5   a trial of settings, up to the gate
#   python runs/evidence_report.py                docs/evidence.md from docs/evidence/*.json
# Needs torch, numpy, safetensors, pillow and pyyaml; weights are kept in out/evidence.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=src exec "${PYTHON:-python3}" -m aad1.evidence "$@"
