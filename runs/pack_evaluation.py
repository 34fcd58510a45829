"""Makes the real clips' statistics that `aad1 evaluate --model doom --quick` uses.

    aad1 data doom --split heldout --clips 256 --seed 1 --out out/data/doom-heldout
    aad1 data doom --split heldout --clips 32 --seed 7 --frames 321 --out out/data/doom-long
    python runs/pack_evaluation.py out/data/doom-heldout out/data/doom-long

The reference is the second half of the clips: the collapse monitor shows the first 64 in training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from aad1.data.shards import ClipShards
from aad1.evaluation import worlds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", type=Path, help="shards of held-out clips")
    parser.add_argument("long", type=Path, help="shards of clips of 20 s")
    parser.add_argument("--out", type=Path, default=Path("src/aad1/packaged/doom_evaluate"))
    parser.add_argument("--fps", type=float, default=16.0)
    args = parser.parse_args()
    half = len(ClipShards(args.data)) // 2
    world = worlds.recorded(args.data, clips=16, skip=half, fps=args.fps, long=args.long)
    worlds.pack(world, args.out, starts=16, videos=8)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
