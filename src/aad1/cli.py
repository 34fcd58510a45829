"""The command line: parse, call, and turn user errors into one line and exit code 2."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from aad1 import __version__, cli_data
from aad1.errors import UserError

if TYPE_CHECKING:
    from aad1.train.plan import Cluster


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Turn one image and a prompt into a video, chunk by chunk, one pass each.

    Example: aad1 generate --model sprites --image frame.png --prompt "red circle moves left"
    """

    image: Path
    """Picture to continue (png, jpg, ...); resized and centre-cropped to the model's size."""
    prompt: str = ""
    """What should happen; the model's words are listed if it knows some of yours not."""
    model: str = "sprites"
    """Packaged name, folder, or hub id."""
    out: Path = Path("out.mp4")
    """.mp4, .gif, or .png (a contact sheet)."""
    chunks: int = 5
    """Chunks to make; one is 16 frames (1 second) with a Wan-strided codec, 4 on sprites."""
    seed: int = 0
    """Same seed, same video; the first n chunks do not depend on how many follow."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    scale: int = 0
    """Enlarge the video by this factor; 0 picks one that makes small videos easy to see."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a preset: `aad1 train sprites-dmd --optim.lr 1e-5`, or a run's own config.yaml.

    `aad1 train --show` shows all presets; `aad1 train PRESET --help` its fields. `aad1 train
    wan14b-aad --dry-run --gpus 64` prints the config, and what the run takes (--gib, --tflops and
    --mfu describe a GPU), and trains nothing.
    """

    name: tyro.conf.Positional[str] = ""
    """Preset name, or the path of a config.yaml."""
    show: bool = False
    """List all presets and stop."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Write a world's clips as shards with a preview sheet.

    For Wan there are `aad1 data videos`, `trajectories` and `lmdb`, each with its own --help.

    Example: aad1 data doom --out out/data/doom --clips 1000 --workers 2
    """

    world: tyro.conf.Positional[str]
    """sprites, doom, or a folder of mp4 files with captions."""
    out: Path = Path("out/data")
    """Folder to write to."""
    clips: int = 64
    split: str = "train"
    """train or heldout (doom: other maps)."""
    seed: int = 0
    workers: int = 2
    size: int = 64
    """sprites: side of a frame in pixels."""
    width: int = 128
    """folder: frame width."""
    height: int = 96
    """folder: frame height."""
    frames: int = 0
    """Frames per clip; 0: 21 for sprites, 81 for the others."""
    fps: float = 16.0
    """folder: frames a second."""


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Encode video shards to latents with a codec, for training."""

    data: tyro.conf.Positional[Path]
    """Folder of video shards (`aad1 data`)."""
    codec: Path = Path("out/doom-codec")
    out: Path = Path("out/data/doom-latents")
    device: str = "auto"
    batch: int = 16


@dataclass(frozen=True, kw_only=True)
class Export:
    """Copy a trained model into one small folder (float16 weights), for sharing or packaging."""

    run: tyro.conf.Positional[Path]
    """A run's final/ folder."""
    out: Path
    half: bool = True
    """Store weights in float16."""


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Encode, tyro.conf.subcommand("encode")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def generate(args: Generate) -> None:
    """Stream to the output file at constant memory and print the speed."""
    import torch

    from aad1.media import check_video_path, write_video
    from aad1.pipeline import Pipeline, pick_device

    if args.chunks < 1:
        raise UserError(f"--chunks must be at least 1, got {args.chunks}")
    if args.scale < 0:
        raise UserError(f"--scale must be at least 0, got {args.scale}")
    check_video_path(args.out)
    pipe = Pipeline.from_pretrained(args.model, device=pick_device(args.device))
    stream = pipe.stream(args.image, args.prompt, seed=args.seed)
    stream.chunks = args.chunks
    frames = 0
    began = time.perf_counter()
    busy = 0.0

    def parts() -> Any:
        nonlocal frames, busy
        while True:
            start = time.perf_counter()
            part = next(stream, None)
            busy += time.perf_counter() - start
            if part is None:
                return
            frames += len(part)
            yield part

    with torch.inference_mode():
        write_video(args.out, parts(), pipe.info.fps, scale=args.scale or None)
    total = time.perf_counter() - began
    model = busy - stream.decode_seconds
    print(
        f"{args.out}: {frames} frames, {args.chunks} chunks in {total:.1f} s; "
        f"{args.chunks / busy:.2f} chunks/s, {frames / busy:.1f} frames/s with decode, "
        f"{frames / model:.1f} without"
    )


def train(args: Train, rest: Sequence[str]) -> None:
    """Run a preset with overrides, or replay a config.yaml."""
    from aad1.presets import preset, presets
    from aad1.train.loop import NonFinite
    from aad1.train.record import read_record
    from aad1.train.run import Run

    if args.show or not args.name:
        for name, e in presets().items():
            print(f"{name:40} {type(e.stage).__name__}, {e.optim.updates} updates")
        return
    is_file = args.name.endswith((".yaml", ".yml"))
    default = read_record(Path(args.name)) if is_file else preset(args.name)
    dry_run, rest = "--dry-run" in rest, [word for word in rest if word != "--dry-run"]
    cluster: Cluster | None = None
    if dry_run:
        from aad1.train import plan

        cluster, rest = tyro.cli(plan.Cluster, args=rest, return_unknown_args=True)
    chosen = tyro.cli(
        type(default),
        default=default,
        args=list(rest),
        prog=f"aad1 train {args.name}",
        config=(tyro.conf.AvoidSubcommands,),
    )
    if cluster is not None:
        from aad1.train.plan import describe

        print(describe(chosen, cluster))
        return
    try:
        Run(chosen).train()
    except NonFinite as error:
        print(f"aad1: {error}; the last checkpoint is kept", file=sys.stderr)
        raise SystemExit(1) from None


def data(args: Data) -> None:
    """Draw, record or cut clips; write shards and preview.png."""
    from aad1.worlds.write import write_world

    write_world(
        args.world, args.out, clips=args.clips, split=args.split, seed=args.seed,
        workers=args.workers, size=args.size, width=args.width, height=args.height,
        frames=args.frames or None, fps=args.fps,
    )  # fmt: skip


def encode(args: Encode) -> None:
    from aad1.pipeline import pick_device
    from aad1.train.encode import encode_shards

    encode_shards(args.data, args.codec, args.out, pick_device(args.device), args.batch)


def export(args: Export) -> None:
    import torch

    from aad1.atomic import replace_folder
    from aad1.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(args.run)
    with replace_folder(args.out) as temporary:
        pipe.save_pretrained(temporary, torch.float16 if args.half else torch.float32)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"{args.out}: {size / 2**20:.1f} MiB")


RUN: dict[type, Callable[[Any], None]] = {
    Generate: generate,
    Data: data,
    Encode: encode,
    Export: export,
}


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning without the line of source that gave it."""
    return f"aad1: {message}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0, or 2 for a user's mistake)."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if args == ["--version"]:
        print(f"aad1 {__version__}")
        return 0
    warnings.formatwarning = _one_line
    kind = args[1] if args[0] == "data" and len(args) > 1 else ""
    rest: list[str] = []
    if args[:1] == ["train"] and len(args) > 1 and not args[1].startswith("-"):
        args, rest = args[:2], args[2:]  # a preset has flags of its own
    try:
        if kind in cli_data.KINDS:
            cli_data.run(kind, args[2:])
            return 0
        command: Any = tyro.cli(
            Command, args=args, prog="aad1", description="One-step streaming video from one image."
        )  # type: ignore[arg-type, call-overload]
        if isinstance(command, Train):
            train(command, rest)
        else:
            RUN[type(command)](command)
    except UserError as error:
        print(f"aad1: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("aad1: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
