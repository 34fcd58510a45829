"""Drive a live session from Python: prompts on a timetable, and a recording of what was shown.

    aad1 serve &
    python examples/switch_prompts.py --out out/switches.mp4

Starts a server of its own if --url is left out.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

from aad1 import Pipeline
from aad1.serve.client import LiveClient
from aad1.serve.facts import read_facts
from aad1.serve.model import PipelineModel
from aad1.serve.run import background
from aad1.serve.server import create_app

PROMPTS = ("walk forward", "turn left", "turn right", "turn left while walking")


def own_server(model: str):
    """A server in this process, on a free port."""
    pipeline = Pipeline.from_pretrained(model)
    return background(create_app(PipelineModel(pipeline), read_facts(model, pipeline)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a running aad1 serve")
    parser.add_argument("--token")
    parser.add_argument("--model", default="doom", help="for a server of its own")
    parser.add_argument("--seconds", type=float, default=3, help="between two switches")
    parser.add_argument("--out", type=Path, default=Path("out/switches.mp4"))
    args = parser.parse_args()
    server = nullcontext(args.url) if args.url else own_server(args.model)
    with server as url, LiveClient(url, token=args.token) as client:
        fps = client.hello["info"]["fps"]
        client.start(PROMPTS[0], sample=next(iter(client.hello["info"]["samples"])))
        client.record()
        left = [*PROMPTS[1:]]
        number, asked = -1, 0.0
        for shown, frame in enumerate(client.frames()):
            if number >= 0 and frame.steer >= number:
                print(f"{shown / fps:5.1f} s: seen after {time.perf_counter() - asked:.2f} s")
                number = -1
            if shown and shown % round(args.seconds * fps) == 0:
                if not left:
                    break
                prompt = left.pop(0)
                number, asked = client.steer(prompt), time.perf_counter()
                print(f"{shown / fps:5.1f} s: {prompt}")
        print(f"{args.out}: {client.save_recording(args.out)} frames")


if __name__ == "__main__":
    main()
