"""Wan 2.1's weights, and few-step generators made from Wan by others, as the parts of a pipeline.

Every layout that `aad1.models.checkpoints` finds its way in will do. A folder with all parts is a
teacher unless a recipe is named. A generator alone takes what it lacks from a base folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from aad1.core.chunks import ChunkGeometry
from aad1.core.flow import sigma_grid
from aad1.errors import UserError
from aad1.model_info import INDEX, ModelInfo
from aad1.models.checkpoints import Parts, find_parts, load_wan_transformer
from aad1.models.codec import Codec
from aad1.models.dit import WanTransformer
from aad1.models.tensor_files import PICKLES, SAFETENSORS
from aad1.models.umt5 import NEGATIVE_PROMPT, Umt5Encoder
from aad1.models.wan_codec import load_wan_vae
from aad1.models.weights import read_json
from aad1.rollout.teacher import Sampling

UNIT = 16
"""Sizes are multiples of it: 8 pixels a latent, 2 latents a patch."""
STEP_SHIFT = 5.0
FEW_STEPS = (1, 2, 4)
WORLD = "wan"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a few-step generator was trained to be rolled out."""

    geometry: ChunkGeometry
    sigmas: tuple[float, ...]
    text_to_video: bool = True


def _from_text(chunk: int) -> ChunkGeometry:
    """Self-Forcing's rollout (algorithm.md, section 4): 21 frames are visible, none beyond them.

    Trained with positions that count from the video's start. Without a sink only differences of
    positions matter, so counting from the first visible frame is the same and never grows.
    """
    return ChunkGeometry(chunk=chunk, first=chunk, sink=0, window=21, relative=True)


def few_step_sigmas(steps: int) -> tuple[float, ...]:
    """Noise levels of a few-step generator: 1 .. 1 / steps, shifted by 5 as Self-Forcing's are.

    4 gives 1, 0.9375, 0.8333, 0.625. UserError for other counts than 1, 2 and 4.
    """
    if steps not in FEW_STEPS:
        raise UserError(f"steps must be one of {', '.join(map(str, FEW_STEPS))}, got {steps}")
    return tuple(sigma_grid(steps, STEP_SHIFT)[:-1].tolist())


RECIPES = {
    "aad1": Recipe(geometry=ChunkGeometry(), sigmas=(1.0,), text_to_video=False),
    "self-forcing": Recipe(geometry=_from_text(3), sigmas=few_step_sigmas(4)),
    "causvid": Recipe(geometry=_from_text(3), sigmas=(1.0, 0.757, 0.522)),
    "longlive": Recipe(
        geometry=ChunkGeometry(chunk=3, first=3, sink=3, window=12), sigmas=few_step_sigmas(4)
    ),
    "one-forcing": Recipe(geometry=_from_text(3), sigmas=(1.0,)),
    "one-forcing-frame": Recipe(geometry=_from_text(1), sigmas=(1.0,)),
}
"""Generators that stream, by name; "teacher" stands beside them for one that does not.

CausVid's levels are its timesteps over 1000; it ends after 21 frames, and goes on here as
Self-Forcing does. LongLive is rolled out as its configuration for unlimited length says, at
positions relative to the cache; its first 12 frames are the same either way.
"""


def is_wan(path: Path) -> bool:
    """Whether `path` holds Wan's weights in a layout of others (our own has its format's name)."""
    if path.is_file():
        return True
    if (path / INDEX).exists():
        return str(read_json(path / INDEX).get("_class_name", "")).startswith("Wan")
    if (path / "codec").is_dir():
        return False  # one of ours that lost its index
    suffixes = (*SAFETENSORS, *PICKLES, ".distcp")  # the last to be refused by name
    return any(p.suffix in suffixes for p in [*path.glob("*"), *path.glob("*/*")])


def load_wan(
    path: Path,
    *,
    base: Path | None,
    recipe: str | None,
    steps: int | None,
    device: torch.device,
    dtype: torch.dtype,
    text_cache: str | Path | None,
    loras: Sequence[tuple[str | Path, float]],
    weights: str,
    transformer_device: torch.device,
) -> tuple[WanTransformer, Codec, Umt5Encoder, ModelInfo]:
    """The parts of a pipeline. Parts that `path` lacks are taken from `base`.

    loras: (file, scale), merged into the transformer. weights: which state dict of a .pt that holds
    several; "" prefers the moving average. transformer_device: of the transformer alone.

    UserError lists what is missing and where it was looked for.
    """
    parts, info = find_wan(path, base=base, recipe=recipe, steps=steps, weights=weights)
    transformer = load_wan_transformer(
        parts.source("transformer"), dtype, transformer_device, loras
    )
    codec = load_wan_vae(parts.source("vae"), dtype, device)
    assert parts.tokenizer is not None
    text = Umt5Encoder.from_source(
        parts.source("text_encoder"), parts.tokenizer, device=device, dtype=dtype, cache=text_cache
    )
    return transformer, codec, text, info


def find_wan(
    path: Path, *, base: Path | None, recipe: str | None, steps: int | None, weights: str = ""
) -> tuple[Parts, ModelInfo]:
    """What `load_wan` loads, before any weight is read. UserError as there."""
    if (path / INDEX).exists():
        _refuse_variants(path)
    parts = find_parts(path, base, weights=weights)
    parts.require("transformer", "vae", "text_encoder", "tokenizer")
    alone = base is not None and find_parts(path, weights=weights).vae is None
    places = [path] if base is None else [path, base]
    return parts, wan_info(recipe or (None if alone else "teacher"), steps, places)


def wan_info(recipe: str | None, steps: int | None, places: list[Path]) -> ModelInfo:
    """The facts of a Wan model rolled out by `recipe`. UserError for an unknown one, or none."""
    known = ", ".join(["teacher", *RECIPES])
    if recipe is None:
        raise UserError(f"{places[0]} does not say how it is rolled out: name a recipe of {known}")
    teacher = ModelInfo(
        world=WORLD, width=832, height=480, fps=16.0, stage="teacher", text_to_video=True,
        sampling=_sampling(places),
    )  # fmt: skip
    if recipe == "teacher":
        return teacher
    if recipe not in RECIPES:
        raise UserError(f"recipe must be one of {known}, got {recipe!r}")
    chosen = RECIPES[recipe]
    return replace(
        teacher,
        stage="aad" if recipe == "aad1" else "distilled",
        geometry=chosen.geometry,
        sigmas=few_step_sigmas(steps) if steps is not None else chosen.sigmas,
        text_to_video=chosen.text_to_video,
        extra={"recipe": recipe},
    )


def _sampling(places: list[Path]) -> Sampling:
    """Wan's own way to sample, with the shift and the solver of the folder's scheduler."""
    plain = Sampling(negative_prompt=NEGATIVE_PROMPT)
    for place in places:
        path = place / "scheduler" / "scheduler_config.json"
        if path.exists():
            raw = read_json(path)
            shift = raw.get("flow_shift", raw.get("shift", plain.shift))
            euler = raw.get("_class_name") == "FlowMatchEulerDiscreteScheduler"
            return replace(plain, shift=float(shift), solver="euler" if euler else "unipc")
    return plain


def _refuse_variants(path: Path) -> None:
    index = read_json(path / INDEX)
    kind = index.get("_class_name")
    if kind != "WanPipeline":
        raise UserError(
            f"{path} is a {kind}; only Wan 2.1 text-to-video (WanPipeline) is supported"
        )
    if (index.get("transformer_2") or [None])[0] is not None:
        raise UserError(f"{path} has two transformers (Wan 2.2); only Wan 2.1 is supported")
