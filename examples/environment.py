"""The model as an environment: reset to a picture, step with actions, keep the frames.

python examples/environment.py --actions up left left right still --out out/episode.mp4
"""

from __future__ import annotations

import argparse
from pathlib import Path

from aad1.media.writing import write_video
from aad1.model_names import PACKAGED
from aad1.serve.environment import Environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="doom")
    parser.add_argument("--image", default=str(PACKAGED / "doom_frames" / "01.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--actions", nargs="+", default=["up", "left", "left", "right", "still"])
    parser.add_argument("--out", type=Path, default=Path("out/episode.mp4"))
    args = parser.parse_args()
    environment = Environment.from_pretrained(args.model)
    pieces = [environment.reset(args.image, seed=args.seed)]
    for action in args.actions:
        pieces.append(environment.step(action))
        print(f"{action}: {environment.prompt}, {len(pieces[-1])} frames")
    print(f"{args.out}: {write_video(args.out, pieces, environment.fps)} frames")


if __name__ == "__main__":
    main()
