"""The command line: parse, call, and turn user errors into one line and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from aad1 import __version__, cli_data, cli_vbench
from aad1.bench.config import BenchConfig
from aad1.errors import UserError
from aad1.evaluation.command import Evaluate, evaluate
from aad1.flags import pair_loras
from aad1.generate import Generate, generate
from aad1.serve.command import Serve, serve

if TYPE_CHECKING:
    from aad1.train.plan import Cluster


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


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Rewrite Wan weights in another format, shard by shard, with LoRAs merged if asked for.

    Example: aad1 convert self_forcing_dmd.pt out/sf --to diffusers --base Wan2.1-T2V-1.3B
    """

    src: tyro.conf.Positional[Path]
    """A folder or file in any format: diffusers, Wan's own, Self-Forcing's .pt, ComfyUI's."""
    dst: tyro.conf.Positional[Path]
    """A new folder, or one file for self-forcing (.pt) and comfyui (.safetensors)."""
    to: str
    """diffusers, original, self-forcing, comfyui or pipeline (a folder of aad1's own)."""
    base: Path | None = None
    """Another path for the parts that SRC lacks (VAE, text encoder, tokenizer)."""
    lora: tuple[Path, ...] = ()
    """LoRA files to merge, in this order."""
    lora_scale: tuple[float, ...] = ()
    """One scale per LoRA; 1 by default."""
    dtype: str = "keep"
    """Of the transformer's weights: keep, fp32, bf16 or fp16."""
    weights: str = ""
    """Which weights of a .pt that holds several; the moving average (generator_ema) by default."""
    recipe: str | None = None
    """--to pipeline: teacher (what is assumed), or how a generator is rolled out: aad1,
    self-forcing, causvid, longlive, one-forcing, one-forcing-frame. A pipeline folder as SRC says
    it itself."""
    shard_gb: float = 5.0
    """Folders: files above this size (10^9 bytes) are split."""


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Encode, tyro.conf.subcommand("encode")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[
        cli_vbench.Command,
        tyro.conf.subcommand("vbench", description="VBench-I2V, beside the paper's table."),
    ]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[BenchConfig, tyro.conf.subcommand("bench")]
)


def train(args: Train, rest: Sequence[str]) -> None:
    """Run a preset with overrides, or replay a config.yaml."""
    from aad1.parallel import mesh
    from aad1.presets import preset, presets
    from aad1.train.guard import Stopped
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

        for field in ("teacher", "init"):  # what a preset names itself need not be there yet
            path: Path | None = getattr(chosen, field)
            if path and path != getattr(default, field) and not path.exists():
                raise UserError(f"--{field}: {path} does not exist")
        print(describe(chosen, cluster))
        return
    try:
        Run(chosen).train()
    except NonFinite as error:
        if first_process():
            print(f"aad1: {error}; the last checkpoint is kept", file=sys.stderr)
        raise SystemExit(1) from None
    except Stopped as stopped:
        if first_process():
            print(f"aad1: {stopped}")
    except RuntimeError as error:
        if not mesh.lost_another(error):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"aad1: process {rank}: another process of this run is gone", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # an orderly end would wait for it
    mesh.leave()


def first_process() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def data(args: Data) -> None:
    """Draw, record or cut clips; write shards and preview.png."""
    from aad1.worlds.write import write_world

    write_world(
        args.world, args.out, clips=args.clips, split=args.split, seed=args.seed,
        workers=args.workers, size=args.size, width=args.width, height=args.height,
        frames=args.frames or None, fps=args.fps,
    )  # fmt: skip


def encode(args: Encode) -> None:
    from aad1.device import pick_device
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


def convert(args: Convert) -> None:
    from aad1.convert import DTYPES
    from aad1.convert import convert as run

    if args.dtype not in ("keep", *DTYPES):
        raise UserError(f"--dtype must be one of keep, {', '.join(DTYPES)}, got {args.dtype!r}")
    if not args.shard_gb > 0:
        raise UserError(f"--shard-gb must be above 0, got {args.shard_gb}")
    parts = run(
        args.src, args.dst, args.to, base=args.base, weights=args.weights, recipe=args.recipe,
        loras=pair_loras(args.lora, args.lora_scale),
        dtype=DTYPES.get(args.dtype), shard_bytes=int(args.shard_gb * 1e9),
    )  # fmt: skip
    print(f"{args.dst}: {', '.join(parts)} ({args.to})")


def bench(args: BenchConfig) -> None:
    from aad1.bench.run import bench as run

    run(args)


RUN: dict[type, Callable[[Any], Any]] = {
    Generate: generate,
    Serve: serve,
    Data: data,
    Encode: encode,
    Export: export,
    Convert: convert,
    Evaluate: evaluate,
    BenchConfig: bench,
}


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning without the line of source that gave it."""
    return f"aad1: {message}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0, or 2 for a user's mistake).

    One of several processes that torchrun started does not return, but ends with that code.
    """
    code, shared = 1, False
    try:
        code = _main(argv)
    except UserError as error:
        shared = getattr(error, "shared", False)
        # What all processes know is told by one of them; torchrun may end the others early.
        if first_process() or not shared:
            print(f"aad1: {error}", file=sys.stderr)
        code = 2
    except SystemExit as ended:
        if not isinstance(ended.code, int) or not _one_of_several():
            raise
        code = ended.code
    if _one_of_several():
        from aad1.parallel import mesh

        mesh.end(code, together=shared)
    return code


def _one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _main(argv: Sequence[str] | None) -> int:
    """`main`, but for users' mistakes."""
    # Threads that spin while they wait starve each other as soon as something else is running:
    # two of them fell from 20 frames per second to less than 5 on a busy machine. OpenMP reads this
    # when PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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
        if args[0] == "vbench" or args[:2] == ["evaluate", "vbench"]:
            cli_vbench.main(args[1 + (args[0] == "evaluate") :])
            return 0
        command: Any = tyro.cli(
            Command, args=args, prog="aad1", description="One-step streaming video from one image."
        )  # type: ignore[arg-type, call-overload]
        if isinstance(command, Train):
            train(command, rest)
        else:
            RUN[type(command)](command)
    except KeyboardInterrupt:
        print("aad1: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be imported yet
            raise
        less = "; a smaller --size takes less, or --offload" if args[0] == "generate" else ""
        said = ". ".join(str(error).splitlines()[0].split(". ")[:2]).rstrip(".")
        print(f"aad1: {said}{less}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
