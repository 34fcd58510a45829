"""`aad1 evaluate`: figures of a model or of a folder of videos, beside what real videos get."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from aad1.errors import UserError

if TYPE_CHECKING:
    from aad1.evaluate.compare import Figure
    from aad1.evaluation.result import Result
    from aad1.evaluation.worlds import RealWorld
    from aad1.pipeline import Pipeline
    from aad1.worlds.sprites import SpritesConfig


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure motion, frame quality, drift and obedience, and write a report.

    Two folders: aad1 evaluate GENERATED REAL
    A model:     aad1 evaluate --model doom --quick
    Float8:      aad1 evaluate --model doom --quick --fp8-gate

    Writes evaluation.json, videos.csv and report.html (one file, nothing else needed).
    """

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    """A folder of generated videos and one of real ones, of equal size and frame rate."""
    model: str | None = None
    """Packaged name, folder, or hub id."""
    world: str | None = None
    """sprites, doom, or a folder of video shards (`aad1 data`); the model's own by default.
    With two folders: whose metric networks tell consistency and motion features."""
    data: Path = Path("out/data/doom-heldout")
    """World doom without --quick: shards of held-out clips."""
    long_data: Path | None = None
    """Shards of long real clips, for the drift of real videos."""
    skip: int = 0
    """Shards: begin at this clip, to leave out those that the collapse monitor showed."""
    quick: bool = False
    """16 clips and 4 long ones; doom from statistics that the package carries."""
    clips: int | None = None
    """Videos to generate; 128, or 16 if quick."""
    long_clips: int | None = None
    """Long ones among them; 64, or 4 if quick."""
    seconds: float = 5.0
    """sprites: length of a short video."""
    long_seconds: float = 20.0
    steered: int | None = None
    """First frames per steering prompt; 64, or 8 if quick; 0 leaves steering out."""
    repeated: int | None = None
    """First frames of which several samples are made; 32, or 4 if quick; 0 leaves it out."""
    samples: int | None = None
    """Samples of each of them; 8, or 4 if quick."""
    seed: int = 0
    fp8_gate: bool = False
    """Roll out 64 videos (--clips) in float8 and without instead, and say whether motion and both
    Fréchet distances stay within 10%; exit code 1 if they do not."""
    validate: bool = False
    """Apply the eleven corruptions to real clips of sprites instead, and write the table of what
    each metric sees."""
    out: Path = Path("out/evaluation")
    """Folder to write to."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def evaluate(args: Evaluate) -> None:
    """Measure, write, and print the main figures. UserError before anything is written."""
    from aad1.device import pick_device

    _check(args)
    device = pick_device(args.device)
    if args.validate:
        from aad1.evaluation.validate import validate

        print(validate(args.out, clips=args.clips or 40, seed=args.seed, device=device))
        return
    if args.folders:
        from aad1.evaluate.networks import for_world
        from aad1.evaluation.folders import evaluate_folders

        networks = None
        if args.world is not None:
            networks = for_world(args.world, device)
            if networks is None:
                raise UserError(
                    f"--world must be sprites or doom, whose metric networks are packaged, "
                    f"got {args.world!r}"
                )
        result = evaluate_folders(args.folders[0], args.folders[1], device, networks)
    elif args.fp8_gate:
        _gate(args)
        return
    else:
        result = _model(args)
    paths = result.write(args.out)
    print(summary(result))
    print(f"written: {', '.join(str(path) for path in paths)}")


def _check(args: Evaluate) -> None:
    if args.folders and len(args.folders) != 2:
        raise UserError(f"two folders are needed, generated and real; got {len(args.folders)}")
    if sum((bool(args.folders), args.model is not None, args.validate)) != 1:
        raise UserError("give two folders, or --model NAME, or --validate: exactly one of them")
    for name in ("clips", "samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    for name in ("long_clips", "steered", "repeated", "skip"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')} must be at least 0, got {value}")
    for name in ("seconds", "long_seconds"):
        if not 0 < getattr(args, name) < 1e4:
            raise UserError(
                f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name):g}"
            )
    if args.fp8_gate and args.model is None:
        raise UserError("--fp8-gate is of a model: give --model NAME")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file, expected a folder")


def _model(args: Evaluate) -> Result:
    import sys

    import torch

    from aad1.device import pick_device
    from aad1.evaluation.model import Plan, evaluate_model
    from aad1.pipeline import Pipeline

    assert args.model is not None
    quick = args.quick

    def amount(given: int | None, full: int, little: int) -> int:
        return given if given is not None else little if quick else full

    plan = Plan(
        clips=amount(args.clips, 128, 16), long_clips=amount(args.long_clips, 64, 4),
        seconds=args.seconds, long_seconds=args.long_seconds,
        steered=amount(args.steered, 64, 8), repeated=amount(args.repeated, 32, 4),
        samples=amount(args.samples, 8, 4), seed=args.seed,
    )  # fmt: skip
    pipe = Pipeline.from_pretrained(args.model, device=pick_device(args.device))
    if pipe.info.stage == "teacher":
        raise UserError("a teacher does not stream from first frames: evaluate a student")
    with torch.no_grad():
        world = real_world(args, pipe, plan.clips)

        def tell(what: str) -> None:
            print(what, file=sys.stderr, flush=True)

        return evaluate_model(pipe, world, plan, tell)


def _gate(args: Evaluate) -> None:
    """Print and write the gate's figures. SystemExit(1) if float8 does not pass."""
    import json
    import sys

    from aad1.atomic import replace_file
    from aad1.device import pick_device
    from aad1.evaluate.frechet import LEAST_VIDEOS
    from aad1.evaluation.gate import fp8_gate
    from aad1.pipeline import Pipeline

    assert args.model is not None
    clips = 64 if args.clips is None else args.clips
    pipe = Pipeline.from_pretrained(args.model, device=pick_device(args.device), fast=False)
    world = real_world(args, pipe, min(clips, LEAST_VIDEOS) if args.quick else clips)

    def tell(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    gate = fp8_gate(pipe, world, clips=clips, seed=args.seed, tell=tell)
    path = args.out / "fp8_gate.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(gate.record(), indent=2) + "\n", encoding="utf-8")
    print("\n".join(gate.lines()))
    print(f"written: {path}")
    if gate.failures():
        raise SystemExit(1)


def real_world(args: Evaluate, pipe: Pipeline, clips: int) -> RealWorld:
    """The real videos that a model is set beside."""
    from aad1.evaluation import worlds

    name = args.world or pipe.info.world
    fps, device = pipe.info.fps, pipe.device
    each = pipe.info.geometry.chunk * pipe.codec.temporal_stride
    if name == "sprites":
        config = sprites_config(
            pipe.info.width, 1 + each * max(1, round(args.seconds * fps / each))
        )
        frames = 1 + each * max(1, round(args.long_seconds * fps / each))
        return worlds.drawn(config, clips=clips, long_frames=frames, fps=fps, device=device)
    if args.quick and not Path(name).is_dir():
        return worlds.packaged(worlds.packaged_folder(name), clips=clips, device=device)
    if name == "doom":
        if not args.data.is_dir():
            raise UserError(
                f"{args.data} is missing: record it with 'aad1 data doom --split heldout --clips "
                f"256 --seed 1 --out {args.data}', name another folder (--data), or use --quick"
            )
        name = str(args.data)
    if not Path(name).is_dir():
        raise UserError(f"--world must be sprites, doom or a folder of shards, got {name!r}")
    return worlds.recorded(
        Path(name), clips=clips, skip=args.skip, fps=fps, long=args.long_data, device=device
    )


def sprites_config(width: int, frames: int) -> SpritesConfig:
    """The drawn world whose frames have this width, as the presets draw it."""
    from aad1.presets import presets
    from aad1.train.config import SpritesData

    for experiment in presets().values():
        if isinstance(experiment.data, SpritesData) and experiment.data.world.size == width:
            return replace(experiment.data.world, frames=frames)
    raise UserError(f"no preset draws sprites of {width} pixels: evaluate with --world FOLDER")


# ---- what is printed ----------------------------------------------------------------------------


def summary(result: Result) -> str:
    """Every figure in plain text: value, interval, M where it must stand, floor, N."""
    from aad1.evaluation.result import label_of

    lines = [result.title]
    for section in result.sections:
        lines.append(f"\n{section.title}")
        if section.note:
            lines.append(f"  {section.note}")
        lines += [_line(label_of(name), f) for name, f in section.figures.items()]
    return "\n".join(lines)


def _line(label: str, figure: Figure) -> str:
    from aad1.evaluation.page import number

    if figure.value is None:
        return f"  {label:52} not computed: {figure.reason}"
    text = f"{number(figure.value):>9}"
    if figure.interval:
        text += f" [{number(figure.interval[0])}, {number(figure.interval[1])}]"
    if figure.M is not None:
        text += f"  at M {number(figure.M)}"
    text += f"  N {figure.videos}"
    if figure.floor is not None:
        text += f"  real {number(figure.floor)} (N {figure.floor_videos})"
    return f"  {label:52}{text}"
