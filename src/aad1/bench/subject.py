"""What is measured: networks with random weights made on the device, or a model folder."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.models.causal_codec import CausalCodec
from aad1.models.codec import Codec, DecoderStream
from aad1.models.dit import WanConfig, WanTransformer
from aad1.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from aad1.models.wan_vae import FastWanVae
from aad1.models.wan_vae_layers import WanVaeConfig

TEXT_ROWS = 512  # of Wan's prompts, padding included
SIZES = {
    "tiny": WanConfig(
        num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=3, text_dim=16,
        freq_dim=32,
    ),
    "1.3b": WanConfig(),
    "14b": WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A generator with its codec and inputs, on the device and in the precision to be measured.

    encode: uint8 [1, 1, H, W, 3] -> latents. plain_decoder, fast_decoder: make a decoder stream;
    None where the decode is left out. encode_text: encodes the prompt again; None if left out.
    """

    model: WanTransformer
    geometry: ChunkGeometry
    sigmas: tuple[float, ...]
    size: tuple[int, int]
    latent_shape: tuple[int, int, int]
    temporal_stride: int
    rows: torch.Tensor
    encode: Callable[[torch.Tensor], torch.Tensor]
    plain_decoder: Callable[[], DecoderStream]
    fast_vae: FastWanVae | None
    half_decoder: Callable[[], DecoderStream] | None
    encode_text: Callable[[], object] | None
    notes: tuple[str, ...]
    tiny_decoder: TinyDecoder | None = None
    """What the fast path decodes with, if it is asked for."""


def fill(module: nn.Module, device: torch.device, seed: int) -> None:
    """Memory on `device` for a module made on the meta device, and random weights in it.

    Matrices have the variance that keeps a signal's size, vectors those of a fresh network.
    """
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in module.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        with torch.no_grad():
            if leaf == "scale_shift_table":
                p.normal_(std=p.shape[-1] ** -0.5, generator=generator)
            elif leaf == "bias":
                p.zero_()
            elif leaf == "gamma" or p.dim() == 1:
                p.fill_(1)
            else:
                p.normal_(std=p[0].numel() ** -0.5, generator=generator)


def random_subject(
    name: str,
    geometry: ChunkGeometry,
    sigmas: tuple[float, ...],
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Subject:
    """Wan's architecture of a size in SIZES, with Wan's autoencoder; nothing is read."""
    width, height = size
    config = SIZES[name]
    vae_config = WanVaeConfig() if name != "tiny" else WanVaeConfig(base_dim=8, num_res_blocks=1)
    for what, value in (("width", width), ("height", height)):
        if value % 16 or value < 16:
            raise UserError(f"size {width}x{height}: {what} {value} must be a multiple of 16")
    with torch.device("meta"):
        model = WanTransformer(config).cast(dtype)
        vae = FastWanVae(vae_config).to(dtype)
    fill(model, device, seed)
    fill(vae, device, seed)
    vae._buffers["latents_mean"] = torch.zeros(1, vae_config.z_dim, 1, 1, 1, device=device)
    vae._buffers["latents_std"] = torch.ones(1, vae_config.z_dim, 1, 1, 1, device=device)
    vae.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, TEXT_ROWS, config.text_dim, generator=generator).to(device, dtype)
    notes = [f"random weights, {count(model)} parameters", "text encoder left out: rows are random"]
    plain = _diffusers_codec(vae, device, dtype)
    if plain is None:
        notes.append("diffusers is not installed: the plain decode is this package's, uncompiled")
    return Subject(
        model=model.eval().requires_grad_(False), geometry=geometry, sigmas=sigmas, size=size,
        latent_shape=(vae_config.z_dim, height // 8, width // 8), temporal_stride=4, rows=rows,
        encode=vae.encode_image, plain_decoder=(plain or vae).stream, fast_vae=vae,
        half_decoder=None,
        encode_text=None, notes=tuple(notes),
    )  # fmt: skip


def folder_subject(
    name: str, size: tuple[int, int] | None, device: torch.device, dtype: torch.dtype
) -> Subject:
    """A pipeline folder or packaged model, with its own geometry and noise levels."""
    from aad1.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(name, device=device, dtype=dtype, fast=False)
    rollout = pipe.rollout
    codec: Codec = pipe.codec
    prompt = _any_prompt(pipe)
    fast = None
    half = None
    if isinstance(codec, CausalCodec):
        half = copy.deepcopy(codec).to(torch.bfloat16).stream
    if hasattr(codec, "vae"):
        fast = FastWanVae.of(codec, channels_last=False)
    return Subject(
        model=pipe.transformer.requires_grad_(False), geometry=rollout.geometry,
        sigmas=rollout.sigmas, size=pipe.check_size(size),
        latent_shape=pipe.latent_shape(size), temporal_stride=codec.temporal_stride,
        rows=pipe.encode_prompt(prompt),
        encode=codec.encode, plain_decoder=codec.stream, fast_vae=fast,
        half_decoder=half,
        encode_text=lambda: pipe.encode_prompt(prompt),
        notes=(f"{name}, {count(pipe.transformer)} parameters",),
    )  # fmt: skip


def with_tiny_decoder(subject: Subject, decoder: str, seed: int) -> Subject:
    """The subject with a tiny decoder from that file, or with "random" weights.

    UserError for a file that does not fit, or latents that are not Wan's.
    """
    model = subject.model
    if subject.fast_vae is None:
        raise UserError(f"a tiny decoder is for Wan 2.1's latents: leave out decoder={decoder}")
    if decoder == "random":
        with torch.device("meta"):
            tiny = TinyDecoder().to(model.dtype)
        fill(tiny, model.device, seed)
        tiny.eval().requires_grad_(False)
    else:
        tiny = load_tiny_decoder(decoder, model.dtype, model.device)
    note = f"tiny decoder, {decoder}, {count(tiny)} parameters"
    return replace(subject, tiny_decoder=tiny, notes=(*subject.notes, note))


def _any_prompt(pipe: Any) -> str:
    words = getattr(getattr(pipe.text, "config", None), "words", ("a cat walks",))
    return str(words[0])


def count(module: nn.Module) -> str:
    """Parameters, in millions."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:,.1f}M"


def _diffusers_codec(vae: FastWanVae, device: torch.device, dtype: torch.dtype) -> Any:
    """The same weights in diffusers' autoencoder; None if it is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    from diffusers import AutoencoderKLWan

    from aad1.models.wan_codec import WanCodec

    c = vae.config
    with torch.device("meta"):
        theirs = AutoencoderKLWan(
            base_dim=c.base_dim, z_dim=c.z_dim, dim_mult=list(c.dim_mult),
            num_res_blocks=c.num_res_blocks, temperal_downsample=list(c.temperal_downsample),
            latents_mean=[0.0] * c.z_dim, latents_std=[1.0] * c.z_dim,
        )  # fmt: skip
    theirs.load_state_dict({k: v.clone() for k, v in vae.state_dict().items()}, assign=True)
    return WanCodec(theirs.eval()).to(device, dtype)
