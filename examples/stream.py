"""Watch a stream: in a window if there is a display, otherwise as an mp4.

python examples/stream.py --prompt "turn left" --seconds 10 --out out/stream.mp4
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from aad1 import Pipeline
from aad1.media.writing import write_video
from aad1.model_names import PACKAGED


def frames(args: argparse.Namespace, pipe: Pipeline) -> Iterator[np.ndarray]:
    """Single frames [H, W, 3], as the chunks are made."""
    stream = pipe.stream(args.image, args.prompt, seed=args.seed)
    stream.chunks = stream.chunks_for(args.seconds)
    for chunk in stream:
        yield from chunk.numpy()


def show(pictures: Iterator[np.ndarray], fps: float, scale: int) -> None:
    """A window, paced to the native rate; closing it ends the stream."""
    import tkinter

    from PIL import ImageTk

    window = tkinter.Tk()
    window.title("aad1")
    label = tkinter.Label(window)
    label.pack()
    due = time.perf_counter()
    try:
        for frame in pictures:
            picture = Image.fromarray(frame)
            size = (picture.width * scale, picture.height * scale)
            label.image = ImageTk.PhotoImage(picture.resize(size))
            label.configure(image=label.image)
            due = max(due + 1 / fps, time.perf_counter() - 0.25)
            while time.perf_counter() < due:
                window.update()
                time.sleep(0.002)
    except tkinter.TclError:
        pass  # the window was closed


def has_window() -> bool:
    """Whether there is tkinter, and a display to open a window on."""
    try:
        import tkinter
    except ImportError:
        return False
    try:
        tkinter.Tk().destroy()
    except tkinter.TclError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="doom")
    parser.add_argument("--image", default=str(PACKAGED / "doom_frames" / "01.png"))
    parser.add_argument("--prompt", default="turn left")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--out", type=Path, help="write an mp4 instead of opening a window")
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained(args.model)
    if args.out is None and not has_window():
        args.out = Path("out/stream.mp4")
    if args.out is None:
        show(frames(args, pipe), pipe.info.fps, scale=max(1, 480 // pipe.info.height))
    else:
        count = write_video(args.out, frames(args, pipe), pipe.info.fps)
        print(f"{args.out}: {count} frames")


if __name__ == "__main__":
    main()
