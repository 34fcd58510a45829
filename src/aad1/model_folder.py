"""The parts of a pipeline, read from a folder and written to one.

A pipeline folder holds everything that generation needs, in open formats:

    model_index.json   world, size, frame rate, geometry, noise levels, lineage
    README.md          the same for people
    transformer/       the generator, a diffusers Wan folder
    codec/             the video codec
    text/              the prompt encoder

Wan 2.1's own weights, and generators made from it by others, are read too (`aad1.wan_folder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from aad1.errors import UserError
from aad1.model_info import ModelInfo, read_info, write_card, write_info
from aad1.models.checkpoints import load_wan_transformer
from aad1.models.codec import Codec, load_codec
from aad1.models.dit import WanTransformer
from aad1.models.text import TextEncoder, WordEncoder
from aad1.models.umt5 import CLASS_NAMES, Umt5Encoder, WeightsChoice
from aad1.models.weights import read_json
from aad1.wan_folder import few_step_sigmas, is_wan, load_wan


class ModelParts(NamedTuple):
    """What a pipeline is made of."""

    transformer: WanTransformer
    codec: Codec
    text: TextEncoder
    info: ModelInfo


def load_parts(
    folder: Path,
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
) -> ModelParts:
    """The parts that a pipeline folder, or one with Wan's weights, holds.

    transformer_device: of the transformer; `device` is that of the others. The rest is as in
    `Pipeline.from_pretrained`. UserError that names the file, key or argument that is wrong.
    """
    if is_wan(folder):
        return ModelParts(
            *load_wan(
                folder, base=base, recipe=recipe, steps=steps, device=device, dtype=dtype,
                text_cache=text_cache, loras=loras, weights=weights,
                transformer_device=transformer_device,
            )
        )  # fmt: skip
    info = read_info(folder)
    if weights:
        raise UserError(f"{folder} holds one set of weights; leave out weights={weights}")
    if recipe is not None:
        raise UserError(f"{folder} says itself how it is rolled out; leave out recipe={recipe}")
    if steps is not None:
        info = replace(info, sigmas=few_step_sigmas(steps))
    network = folder / "transformer"
    if loras:
        info = replace(info, sha256="")  # other weights than those
        transformer = load_wan_transformer(network, dtype, transformer_device, loras)
    else:
        transformer = WanTransformer.from_pretrained(network, dtype, transformer_device)
    codec = load_codec(folder / "codec", dtype, device)
    return ModelParts(
        transformer, codec, _text(folder / "text", base, device, dtype, text_cache), info
    )


def _text(
    folder: Path,
    base: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    cache: str | Path | None,
) -> TextEncoder:
    """The prompt encoder that `folder` holds, or that of `base` for one that was left out."""
    facts = read_json(folder / "config.json")
    if facts.get("_class_name") in CLASS_NAMES:
        home = folder if base is None or facts.get("encoder") else base
        return Umt5Encoder.from_pretrained(home, device=device, dtype=dtype, cache=cache)
    return WordEncoder.from_pretrained(folder).to(device).eval().requires_grad_(False)


def save_parts(folder: Path, parts: ModelParts, dtype: torch.dtype, text: WeightsChoice) -> None:
    """Write a pipeline folder; see `Pipeline.save_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts.transformer.save_pretrained(folder / "transformer", dtype)
    parts.codec.save_pretrained(folder / "codec", dtype)
    if isinstance(parts.text, Umt5Encoder):
        parts.text.save_pretrained(folder / "text", text)
    else:
        parts.text.save_pretrained(folder / "text")
    write_card(folder, parts.info, sum(p.numel() for p in parts.transformer.parameters()))
    write_info(folder, parts.info)  # last: a folder without an index is not a model
