"""`aad1 vbench videos | check | run | report`: VBench-I2V of a model, beside the paper's table."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from aad1.errors import UserError

if TYPE_CHECKING:
    import torch

    from aad1.pipeline import Pipeline
    from aad1.vbench.environment import Environment
    from aad1.vbench.protocol import Pair


@dataclass(frozen=True, kw_only=True)
class Videos:
    """Make the video set of a model: 355 prompts x 5 seeds, or the long videos for the drift score.

    Running the command again goes on where it stopped; with --part i/n, n processes share the work.

    Example: aad1 vbench videos --model my-model --vbench-root VBench --out out/vbench/my-model
    """

    vbench_root: Path
    """Git checkout of VBench, with the images in vbench2_beta_i2v/data/crop/RATIO."""
    model: str
    """Packaged name, folder, hub id, or a generator's weights (then with --base and --recipe)."""
    out: Path = Path("out/vbench")
    """Folder of this model's evaluation: videos/, drift/, results/, report.json."""
    ratio: str = "26-15"
    """Which crops of the images; 26-15 is 832x480 exactly."""
    seconds: float | None = None
    """Length of a video; 5, and 20 with --drift."""
    drift: bool = False
    """Make the long videos: one for each of --drift-videos prompts."""
    drift_videos: int = 100
    """How many long videos, of prompts spread evenly over the list (the paper: 100, not named)."""
    seeds: int = 5
    """Videos per prompt; fewer than 5 is not the published set."""
    seed: int = 0
    """Seed of the first video; the k-th has this plus k."""
    part: str = "0/1"
    """i/n: this process makes each n-th video from the i-th on."""
    base: str | None = None
    """Wan 2.1's folder, for the parts that a generator by itself lacks."""
    recipe: str | None = None
    """How a generator made elsewhere is rolled out, as in `aad1 generate`."""
    weights: str = ""
    """Which weights of a .pt that holds several."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels; the model's own if left out."""
    steps: int | None = None
    """Network passes per chunk: 1, 2 or 4."""
    text_cache: Path | None = None
    """Folder for encoded prompts; with it, a large prompt encoder is released before the videos."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision; auto is bfloat16 on cuda and float32 otherwise."""


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    vbench_root: Path
    """Git checkout of VBench; it is only read, and its folder is where VBench runs."""
    python: Path
    """The Python of an environment in which VBench can be imported."""
    out: Path = Path("out/vbench")
    """Folder of this model's evaluation."""
    videos: Path | None = None
    """Folder of the set; OUT/videos if left out."""
    cache: Path | None = None
    """VBench's folder of weights; $VBENCH_CACHE_DIR or ~/.cache/vbench if left out."""
    torch_home: Path | None = None
    """torch.hub's folder; $TORCH_HOME or ~/.cache/torch if left out."""
    ratio: str = "26-15"
    """Which crops of the images the videos were made from."""
    dimensions: tuple[str, ...] = ()
    """Some of the eight; all if left out."""
    seeds: int = 5
    """Videos per prompt in the set; fewer than 5 is not the published set."""
    device: str = "cuda"
    """Device for VBench's networks: cuda, cuda:1 or cpu."""


@dataclass(frozen=True, kw_only=True)
class Check(_Evaluation):
    """List each weight, image, video and module that VBench will miss, with where it looks."""


@dataclass(frozen=True, kw_only=True)
class Run(_Evaluation):
    """Check everything, score each dimension in a process of its own, and print the table.

    A dimension that fails leaves the others alone; running again does only what is missing.
    With OUT/drift there, the drift score too.

    Example: aad1 vbench run --vbench-root VBench --python vbench-env/bin/python
    """

    drift: Path | None = None
    """Folder of the long videos; OUT/drift, if it is there."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Print the table again from OUT/results."""

    out: Path = Path("out/vbench")


Command = (
    Annotated[Videos, tyro.conf.subcommand("videos")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def videos(args: Videos) -> None:
    """Make what is missing of the set."""
    from aad1.vbench.protocol import Places, departures, read_pairs
    from aad1.vbench.videos import make_videos, spread, wanted_videos

    root = _absolute(args.vbench_root)
    pairs = read_pairs(root)
    for note in departures(pairs, args.seeds):
        print(f"aad1: not the published set: {note}", file=sys.stderr)
    images = Places(root, root, root, args.ratio).images
    wanted = wanted_videos(pairs, images, seeds=args.seeds, seed=args.seed)
    folder = args.out / "videos"
    if args.drift:
        wanted = wanted_videos(spread(pairs, args.drift_videos), images, seeds=1, seed=args.seed)
        folder = args.out / "drift"
    seconds = args.seconds if args.seconds is not None else (20.0 if args.drift else 5.0)
    if not 0 < seconds < float("inf"):
        raise UserError(f"--seconds must be above 0, got {seconds:g}")
    pipe = _pipeline(args)
    width, height = pipe.check_size(_size(args.size))
    if args.text_cache is not None:
        for prompt in dict.fromkeys(video.prompt for video in wanted):
            pipe.encode_prompt(prompt)
        pipe.release_text()

    def make(image: Path, prompt: str, seed: int) -> Iterator[torch.Tensor]:
        import torch

        with torch.inference_mode():
            stream = pipe.stream(image, prompt, seed=seed, size=(width, height))
            stream.chunks = stream.chunks_for(seconds)
            yield from stream

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total}", end="\n" * (done == total), file=sys.stderr, flush=True)

    settings = dict(
        model=args.model, sha256=pipe.info.sha256, stage=pipe.info.stage, recipe=args.recipe,
        weights=args.weights, passes_per_chunk=len(pipe.info.sigmas), ratio=args.ratio,
        width=width, height=height, seconds=seconds, dtype=args.dtype,
    )  # fmt: skip
    index, parts = _part(args.part)
    made = make_videos(
        folder, wanted, make, fps=pipe.info.fps, settings=settings, part=(index, parts),
        on_video=show,
    )  # fmt: skip
    there = sum((folder / video.name).is_file() for video in wanted)
    print(f"{folder}: {made} videos made, {there} of {len(wanted)} are there")


def check(args: Check) -> None:
    """Print the list; UserError if it is not empty."""
    from aad1.vbench.protocol import choose_dimensions

    environment, pairs = _environment(args)
    _preflight(args, environment, pairs, choose_dimensions(args.dimensions))
    print("nothing is missing")


def run(args: Run) -> None:
    """Preflight, scores, drift, report; UserError after the report if something failed."""
    from aad1.vbench.driver import Driver
    from aad1.vbench.merge import merge, table
    from aad1.vbench.protocol import choose_dimensions, departures
    from aad1.vbench.videos import read_settings

    dimensions = choose_dimensions(args.dimensions)
    environment, pairs = _environment(args)
    _preflight(args, environment, pairs, dimensions)
    out, folder = _absolute(args.out), _set_folder(args)
    driver = Driver(environment, out, lambda line: print(line, flush=True))
    failed = driver.score_set(pairs, dimensions, folder, args.seeds)
    drift = _absolute(args.drift or args.out / "drift")
    if args.drift is not None or drift.is_dir():
        failed |= driver.score_drift(drift)
    made = read_settings(folder)
    notes = [f"not the published set: {note}" for note in departures(pairs, args.seeds)]
    if made is None:
        notes.append(f"{folder} was not made by aad1: model and seeds are not known")
    model = None if made is None else made["settings"]
    report = merge(out, model=model, notes=notes, failed=failed)
    print(f"\n{table(report)}\n\n{out / 'report.json'}, {out / 'report.md'}")
    if failed:
        first = next(iter(failed))
        raise UserError(
            f"{len(failed)} of the scores were not computed ({', '.join(failed)}); "
            f"{first}: {failed[first]}"
        )


def report(args: Report) -> None:
    """The table of the last run."""
    import json

    from aad1.vbench.merge import table

    path = args.out / "report.json"
    try:
        print(table(json.loads(path.read_text(encoding="utf-8"))))
    except OSError:
        raise UserError(f"{path} does not exist: `aad1 vbench run` writes it") from None
    except (ValueError, KeyError):
        raise UserError(f"{path} is damaged: `aad1 vbench run` writes it anew") from None


COMMANDS: dict[type, Callable[[Any], None]] = {
    Videos: videos,
    Check: check,
    Run: run,
    Report: report,
}


def main(args: list[str], prog: str = "aad1 vbench") -> None:
    """Parse and run; raises UserError for a user's mistake."""
    command: Any = tyro.cli(
        Command, args=args, prog=prog, description="VBench-I2V, beside the paper's table."
    )  # type: ignore[arg-type, call-overload]
    COMMANDS[type(command)](command)


def _absolute(path: Path) -> Path:
    """VBench runs in another folder; `~` is the user's. Links stay: a venv's python is one."""
    return Path(os.path.abspath(path.expanduser()))


def _set_folder(args: _Evaluation) -> Path:
    return _absolute(args.videos or args.out / "videos")


def _environment(args: _Evaluation) -> tuple[Environment, list[Pair]]:
    from aad1.vbench.environment import Environment
    from aad1.vbench.protocol import SEEDS, Places, read_pairs

    if not 1 <= args.seeds <= SEEDS:
        raise UserError(f"--seeds must be in 1..{SEEDS}, got {args.seeds}")
    home, environ = Path.home(), os.environ
    default = environ.get("VBENCH_CACHE_DIR") or home / ".cache" / "vbench"
    cache_home = environ.get("XDG_CACHE_HOME") or home / ".cache"
    torch_home = environ.get("TORCH_HOME") or Path(cache_home) / "torch"
    root, out = _absolute(args.vbench_root), _absolute(args.out)
    places = Places(
        root,
        cache=_absolute(Path(args.cache or default)),
        hub=_absolute(Path(args.torch_home or torch_home)) / "hub",
        ratio=args.ratio,
    )
    pairs = read_pairs(root)
    return Environment(places, _absolute(args.python), args.device, out / "work"), pairs


def _preflight(
    args: _Evaluation, environment: Environment, pairs: list[Pair], dimensions: list[str]
) -> None:
    from aad1.vbench.preflight import check_all

    problems = check_all(environment, pairs, dimensions, _set_folder(args), args.seeds)
    for problem in problems:
        print(problem)
    if problems:
        kinds = [p.kind for p in problems]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        raise UserError(f"VBench cannot run yet: {len(problems)} problems, listed above ({counts})")


def _pipeline(args: Videos) -> Pipeline:
    import torch

    from aad1.device import pick_device
    from aad1.model_names import find_model
    from aad1.pipeline import Pipeline

    device = pick_device(args.device)
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    pipe = Pipeline.from_pretrained(
        find_model(args.model), device=device, dtype=torch.bfloat16 if half else torch.float32,
        base=args.base, recipe=args.recipe, steps=args.steps, text_cache=args.text_cache,
        weights=args.weights,
    )  # fmt: skip
    _ = pipe.rollout  # refuses a teacher, which cannot continue an image
    return pipe


def _size(text: str | None) -> tuple[int, int] | None:
    from aad1.flags import parse_size

    return parse_size(text)


def _part(text: str) -> tuple[int, int]:
    try:
        index, parts = (int(word) for word in text.split("/"))
    except ValueError:
        raise UserError(f"--part must be i/n with 0 <= i < n, got {text}") from None
    return index, parts
