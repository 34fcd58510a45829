"""The parts of a Wan base folder that distillation needs, each loaded by itself.

A base folder has `transformer/`, `vae/`, `text_encoder/` and `tokenizer/`. A run folder's final/
(`transformer/`, `codec/`, `model_index.json`) may stand in for the transformer and the codec.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from aad1.data.text_store import TextStore
from aad1.errors import UserError
from aad1.models.codec import Codec, latent_frames, load_codec
from aad1.models.dit import WanTransformer
from aad1.models.text import TextEncoder

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""What Wan 2.1 samples with as its negative prompt."""

TEMPORAL_STRIDE, SPATIAL_STRIDE = 4, 8
"""Of Wan 2.1's codec."""
_PATCH = 2
"""Wan's transformer takes patches of 2x2 latents, so sizes are multiples of 2 x 8 pixels."""

LoadText = Callable[[], TextEncoder]


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """What a clip is: pixels, video frames, frames a second."""

    width: int = 832
    height: int = 480
    frames: int = 81
    fps: float = 16.0

    def latent(
        self, temporal_stride: int = TEMPORAL_STRIDE, spatial_stride: int = SPATIAL_STRIDE
    ) -> tuple[int, int, int]:
        """(F, h, w) in latent space; UserError unless codec and patches divide the size."""
        step = _PATCH * spatial_stride
        for name in ("width", "height"):
            size = getattr(self, name)
            if size < 1 or size % step:
                low = max(size // step * step, step)
                near = f"{low} or {low + step}" if low < size else f"{low}"
                raise UserError(f"{name} must be a multiple of {step}, got {size}; use {near}")
        frames = latent_frames(self.frames, temporal_stride)
        return frames, self.height // spatial_stride, self.width // spatial_stride


def part(base: Path, *names: str) -> Path:
    """The folder of one part, of the first of these names that is there.

    UserError says what is missing and where it was looked for.
    """
    if not base.is_dir():
        raise UserError(f"{base} does not exist; give the folder of a Wan model")
    for name in names:
        if (base / name).is_dir():
            return base / name
    looked = " and ".join(str(base / name) for name in names)
    raise UserError(f"{base} is no Wan model: no {names[0]} in {looked}")


def load_transformer(
    base: Path, device: torch.device, dtype: torch.dtype = torch.float32
) -> WanTransformer:
    """The diffusion transformer, frozen or not as it comes, in `dtype`."""
    return WanTransformer.from_pretrained(part(base, "transformer"), dtype, device)


def load_base_codec(base: Path, device: torch.device) -> Codec:
    """The video codec, in float32."""
    return load_codec(part(base, "vae", "codec"), device=device)


def load_text_encoder(base: Path, device: torch.device) -> TextEncoder:
    """Wan's UMT5; 11 GB in bfloat16, so drop it as soon as the prompts are encoded."""
    encoder = import_module("aad1.models.umt5").Umt5Encoder
    part(base, "tokenizer")
    part(base, "text_encoder")
    loaded: TextEncoder = encoder.from_pretrained(base, device=device)
    return loaded


def store_prompts(
    folder: Path, prompts: Sequence[str], load_text: LoadText, *, negative: str, encoder: str
) -> TextStore:
    """Embed the negative prompt and those of the prompts that `folder` has not yet.

    load_text is called only if there are any; the encoder is gone when this returns.
    encoder: what tells its weights from others. UserError if `folder` was begun differently.
    """
    wanted = [negative, *prompts]
    if (folder / "index.json").exists():
        store = TextStore(folder)
        store = TextStore.create(
            folder, length=store.length, dim=store.dim, negative=negative, encoder=encoder
        )
        if not store.missing(wanted):
            return store
    text = load_text()
    store = TextStore.create(
        folder, length=text.length, dim=text.dim, negative=negative, encoder=encoder
    )
    store.add(wanted, text)
    del text
    gc.collect()
    return store


def digest(folder: Path) -> str:
    """Tells one set of weights from another: names, sizes and ends of the files in `folder`.

    Reads 128 KiB a file rather than all of it: a header with every tensor's name and shape, and the
    last weights, which any training would have changed.
    """
    out = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != "."):
        size = path.stat().st_size
        out.update(f"{path.relative_to(folder)}/{size}/".encode())
        with path.open("rb") as file:
            out.update(file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            out.update(file.read())
    return out.hexdigest()[:32]
