"""`aad1 data videos | trajectories | lmdb`: what distilling Wan needs on disk."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from aad1.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Videos:
    """Encode a folder of captioned videos: VAE latents and text embeddings in shards.

    A caption is NAME.txt beside NAME.mp4, or a row of captions.csv or captions.jsonl. Running the
    command again goes on where it stopped.

    Example: aad1 data videos clips --model models/Wan2.1-T2V-1.3B-Diffusers --out out/data/wan
    """

    folder: tyro.conf.Positional[Path]
    """Folder of videos and captions."""
    model: Path
    """Wan's VAE, text encoder and tokenizer: a folder in any layout."""
    out: Path = Path("out/data/wan")
    width: int = 832
    """Frames are scaled and cropped at the centre to width x height, never distorted."""
    height: int = 480
    frames: int = 81
    """Frames per clip; longer videos give several clips."""
    fps: float = 16.0
    """Frames a second; videos of another or a changing rate are resampled by their clock."""
    negative_prompt: str | None = None
    """Default: Wan's own."""
    shard: int = 16
    """Clips per file."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: str = "auto"
    """auto (bf16 on CUDA, else fp32), fp32 or bf16."""


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """Sample the teacher's trajectories for stage I, keeping only the states a student uses.

    Give --prompts, or --data, whose captions and size are taken. Running the command again goes on
    where it stopped; with --part i/n, n machines share the work in one folder.

    Example: aad1 data trajectories --teacher models/Wan2.1-T2V-1.3B-Diffusers --prompts p.txt
    """

    teacher: Path
    """Wan's weights in any format; for --prompts a folder that has the text encoder too, or give
    --base."""
    base: Path | None = None
    """With --prompts: a Wan folder for the text encoder that --teacher lacks."""
    prompts: Path | None = None
    """Text file, one prompt a line."""
    data: Path | None = None
    """Folder of `aad1 data videos`."""
    out: Path = Path("out/data/wan-trajectories")
    clips: int = 0
    """Trajectories in all; 0: one per prompt. More than prompts: each prompt several times."""
    student_steps: int = 2
    """Keep the states of students with this many steps: 1, 2 (serves 1 as well) or 4 (all)."""
    steps: int = 48
    """Euler steps on the grid shift(i / steps)."""
    shift: float = 5.0
    guidance: float = 6.0
    """Classifier-free guidance, uncond + guidance (cond - uncond)."""
    negative_prompt: str | None = None
    """Default: Wan's own, or that of --data."""
    width: int = 832
    height: int = 480
    frames: int = 81
    """Video frames."""
    batch: int = 4
    """Trajectories sampled together, and per file."""
    part: str = "0/1"
    """i/n with 0 <= i < n: make every n-th file from the i-th on."""
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    """auto (bf16 on CUDA, else fp32), fp32 or bf16."""


@dataclass(frozen=True, kw_only=True)
class Lmdb:
    """Import teacher trajectories in Self-Forcing's LMDB format.

    Example: aad1 data lmdb ode_pairs --model models/Wan2.1-T2V-1.3B-Diffusers --shift 8
    """

    folder: tyro.conf.Positional[Path]
    """Folder with data.mdb, or with several such folders."""
    model: Path
    """Wan's text encoder and tokenizer: a folder in any layout."""
    out: Path = Path("out/data/wan-trajectories")
    student_steps: int = 1
    """Keep the states of students with this many steps: 1, 2 or 4."""
    shift: float = 5.0
    """Timestep shift that the trajectories were sampled with; it is not in the file."""
    negative_prompt: str | None = None
    """Default: Wan's own."""
    batch: int = 8
    """Trajectories per file."""
    device: str = "auto"


def videos(args: Videos) -> None:
    """Encode prompts, then videos; report what was left out."""
    from aad1.models.checkpoints import find_parts
    from aad1.models.umt5 import NEGATIVE_PROMPT, check_umt5, find_encoder
    from aad1.models.wan_codec import load_wan_vae
    from aad1.train.videos import encode_videos
    from aad1.train.wan_base import VideoSize, check_frames, load_text_encoder

    device, bf16 = _device(args.device, args.precision)
    check_frames(args.frames)
    vae, text = find_parts(args.model).source("vae"), find_encoder(args.model)[0]
    check_umt5(text)
    encode_videos(
        args.folder, args.out, load_wan_vae(vae, device=device),
        lambda: load_text_encoder(args.model, device),
        size=VideoSize(width=args.width, height=args.height, frames=args.frames, fps=args.fps),
        origin={"vae": vae.fingerprint, "text": text.fingerprint},
        device=device, bf16=bf16, clips_per_shard=args.shard,
        negative=NEGATIVE_PROMPT if args.negative_prompt is None else args.negative_prompt,
    )  # fmt: skip


def trajectories(args: Trajectories) -> None:
    """Embed the prompts of this part, let the encoder go, then sample."""
    from aad1.core.chunks import ChunkGeometry
    from aad1.data.shards import ClipShards
    from aad1.data.text_store import TextStore
    from aad1.models.checkpoints import find_parts, load_wan_transformer
    from aad1.models.umt5 import NEGATIVE_PROMPT, check_umt5, find_encoder
    from aad1.models.wan_shapes import umt5_json, wan_config
    from aad1.models.weights import check_names
    from aad1.train.config import TrajectoryConfig
    from aad1.train.sources import key
    from aad1.train.trajectories import shards_of_part, write_trajectories
    from aad1.train.wan_base import VideoSize, check_frames, load_text_encoder, store_prompts
    from aad1.train.wan_world import StoredConditioner, StoredText

    if (args.prompts is None) == (args.data is None):
        raise UserError("give either --prompts FILE or --data FOLDER")
    device, bf16 = _device(args.device, args.precision)
    # What is wrong is told before a network is loaded, and before the folder is begun.
    sigmas = _sigmas(args.student_steps, args.shift)
    if args.steps < 1 or args.steps % args.student_steps:
        unit = args.student_steps
        low = args.steps // unit * unit
        near = f"nearest are {low} and {low + unit}" if low >= unit else f"nearest is {unit}"
        raise UserError(
            f"--steps must be a multiple of --student-steps {unit}, whose noise levels are kept, "
            f"got {args.steps}; the {near}"
        )
    weights = find_parts(args.teacher).source("transformer")
    network = wan_config(weights)
    check_names(network, weights)
    base = args.base or args.teacher
    if args.data is not None:
        shards = ClipShards(args.data)
        prompts = [clip[0] for clip in shards.captions]
        frames, height, width = shards.clip_shape[-3:]
        try:
            ChunkGeometry().chunks(frames)
        except UserError as error:
            raise UserError(f"--data {args.data}: {error}") from None
        text_dim, where = TextStore(args.data / "text").dim, args.data / "text"
    else:
        assert args.prompts is not None
        prompts = _read_prompts(args.prompts)
        check_frames(args.frames)
        size = VideoSize(width=args.width, height=args.height, frames=args.frames)
        frames, height, width = size.latent()
        encoder = find_encoder(base)[0]
        check_umt5(encoder)
        text_dim, where = umt5_json(encoder)["d_model"], encoder.where
    if text_dim != network.text_dim:
        raise UserError(
            f"{weights.where} takes text of width {network.text_dim}, {where} has {text_dim}"
        )
    config = TrajectoryConfig(
        clips=args.clips or len(prompts), steps=args.steps, shift=args.shift,
        guidance_scale=args.guidance, batch=args.batch,
    )  # fmt: skip
    share = _part(args.part)
    mine = [prompts[c % len(prompts)] for _, clips in shards_of_part(config, share) for c in clips]
    if args.data is not None:
        given = TextStore(args.data / "text")
        if args.negative_prompt not in (None, given.negative):
            raise UserError(
                f"--negative-prompt must be that of --data, {given.negative!r}, "
                f"got {args.negative_prompt!r}"
            )
        store = TextStore.create(
            args.out / "text", length=given.length, dim=given.dim, negative=given.negative,
            encoder=given.encoder,
        )  # fmt: skip
        store.copy_from(given, [given.negative, *mine])
    else:
        store = store_prompts(
            args.out / "text", mine, lambda: load_text_encoder(base, device),
            negative=NEGATIVE_PROMPT if args.negative_prompt is None else args.negative_prompt,
            encoder=encoder.fingerprint,
        )  # fmt: skip
    gc.collect()
    import torch

    teacher = load_wan_transformer(weights, torch.bfloat16 if bf16 else torch.float32, device)
    text = StoredText([store], device, args.teacher)
    write_trajectories(
        args.out,
        teacher,
        StoredConditioner(text, ChunkGeometry(), store.negative),
        prompts,
        (network.in_channels, frames, height, width),
        sigmas,
        config,
        made_by=f"{weights.fingerprint} {key(store.negative):016x}",
        seed=args.seed,
        part=share,
        bf16=bf16,
    )


def lmdb(args: Lmdb) -> None:
    """Embed the prompts, then copy the states."""
    from aad1.models.umt5 import NEGATIVE_PROMPT
    from aad1.train.lmdb_import import OdeLmdb, import_lmdb
    from aad1.train.wan_base import load_text_encoder, store_prompts

    device, _ = _device(args.device, "fp32")
    prompts = OdeLmdb(args.folder).prompts()
    store_prompts(
        args.out / "text", prompts, lambda: load_text_encoder(args.model, device),
        negative=NEGATIVE_PROMPT if args.negative_prompt is None else args.negative_prompt,
        encoder=_fingerprint_of_text(args.model),
    )  # fmt: skip
    import_lmdb(
        args.folder, args.out, sigmas=_sigmas(args.student_steps, args.shift), shift=args.shift,
        batch=args.batch,
    )  # fmt: skip


KINDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "videos": (Videos, videos),
    "trajectories": (Trajectories, trajectories),
    "lmdb": (Lmdb, lmdb),
}


def run(kind: str, args: Sequence[str]) -> None:
    """Parse and run one of KINDS."""
    flags, call = KINDS[kind]
    call(tyro.cli(flags, args=list(args), prog=f"aad1 data {kind}"))


def _device(name: str, precision: str) -> tuple[torch.device, bool]:
    from aad1.device import pick_device

    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"precision must be auto, fp32 or bf16, got {precision!r}")
    device = pick_device(name)
    return device, precision == "bf16" or (precision == "auto" and device.type == "cuda")


def _fingerprint_of_text(model: Path) -> str:
    from aad1.models.umt5 import find_encoder

    return find_encoder(model)[0].fingerprint


def _sigmas(student_steps: int, shift: float) -> tuple[float, ...]:
    """The student's noise levels: evenly spaced steps, shifted as the teacher's grid is."""
    from aad1.core.flow import sigma_grid

    if student_steps not in (1, 2, 4):
        raise UserError(f"--student-steps must be 1, 2 or 4, got {student_steps}")
    return tuple(sigma_grid(student_steps, shift)[:-1].tolist())


def _part(text: str) -> tuple[int, int]:
    try:
        index, parts = (int(word) for word in text.split("/"))
    except ValueError:
        raise UserError(f"--part must be i/n with 0 <= i < n, got {text}") from None
    return index, parts


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable UTF-8 text file: {error}") from None
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompts; write one a line")
    return prompts
