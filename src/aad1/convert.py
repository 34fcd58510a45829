"""`aad1 convert`: Wan weights from any format that is read into any of those in use.

    diffusers      DST/transformer, vae, text_encoder, tokenizer, scheduler, model_index.json
    original       DST/diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth, models_t5_*.pth, ...
    self-forcing   DST is one .pt file: {"generator": {"model.<original name>": ...}}
    comfyui        DST is one .safetensors file, `model.diffusion_model.<original name>`
    pipeline       DST is a folder of `aad1.Pipeline`: transformer, codec, text, model_index.json

Folders get the parts that were found; a file gets the transformer alone. Tensors go from file to
file shard by shard; only a .pt needs its whole content in memory. The result appears whole or not
at all.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from aad1.atomic import replace_file, replace_folder
from aad1.errors import UserError
from aad1.model_info import FORMAT, INDEX, ModelInfo, read_info, write_card, write_info
from aad1.models import wan_keys
from aad1.models.checkpoints import Parts, find_parts
from aad1.models.dit import WanConfig
from aad1.models.finite import finite
from aad1.models.lora import merger
from aad1.models.tensor_files import CONFIG_KEY, Source, Spec
from aad1.models.umt5 import check_umt5
from aad1.models.wan_codec import check_vae
from aad1.models.wan_shapes import umt5_json, vae_json, wan_config
from aad1.models.weights import (
    SHARD_BYTES,
    STEM,
    Change,
    check_names,
    read_json,
    transformer_json,
    write_json,
    write_shards,
    write_tensors,
)
from aad1.wan_folder import WORLD, wan_info

FORMATS = ("diffusers", "original", "self-forcing", "comfyui", "pipeline")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SUFFIX = {"self-forcing": ".pt", "comfyui": ".safetensors"}
_VAE_FILE, _T5_FILE = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"


@dataclass(frozen=True)
class Renamed:
    """A source under other names, cast and changed while it is read (`LazyTensors`)."""

    source: Source
    names: Mapping[str, str]
    """New name -> the source's."""
    dtype: torch.dtype | None = None
    change: Change | None = None

    @property
    def specs(self) -> dict[str, Spec]:
        own = self.source.specs
        return {new: self._spec(own[old]) for new, old in self.names.items()}

    def _spec(self, spec: Spec) -> Spec:
        keep = self.dtype is None or not spec.dtype.is_floating_point
        return spec if keep else Spec(spec.shape, self.dtype or spec.dtype)

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        new_names = {self.names[new]: new for new in (self.names if names is None else names)}
        for old, tensor in self.source.read(new_names):
            spec = self._spec(Spec(tuple(tensor.shape), tensor.dtype))
            value = self.change(old, tensor) if self.change else tensor
            cast = value.to(spec.dtype, copy=True)
            if not finite(cast):
                where = f"{self.source.where}: {old}"
                if finite(value):
                    most = torch.finfo(spec.dtype).max
                    raise UserError(f"{where} has numbers above {most:g}: no {spec.dtype} holds it")
                raise UserError(f"{where} holds NaN or infinity: the file is damaged")
            yield new_names[old], cast


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    base: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    weights: str = "",
    recipe: str | None = None,
) -> list[str]:
    """Write `dst` in the format `to`; returns the names of the parts that were written.

    base: supplies the parts that `src` lacks.
    loras: (file, scale), merged into the transformer.
    dtype: of the transformer; None keeps what each tensor has. VAE and text encoder stay as they
        are.
    shard_bytes: files above this size are split (folders only).
    weights: which state dict of a .pt that holds several; "" prefers the moving average.
    recipe: of a pipeline: "teacher", or how a generator is rolled out (`wan_folder.RECIPES`). None
        keeps what a pipeline folder says of itself, and is "teacher" for others.

    UserError before anything is written if the parts are missing, unsupported or do not fit, or
    `dst` exists or has the wrong suffix.
    """
    target = Path(dst)
    if to not in FORMATS:
        raise UserError(f"the format must be one of {', '.join(FORMATS)}, got {to!r}")
    suffix = _SUFFIX.get(to, "")
    if suffix and target.suffix != suffix:
        raise UserError(f"{to} is one file: {target} must end in {suffix}")
    if target.is_file() and not suffix:
        raise UserError(f"{target} is a file; {to} needs a new folder")
    if target.is_dir() and (suffix or any(target.iterdir())):
        raise UserError(f"{target} is a folder with something in it; name a new one")
    if shard_bytes < 1:
        raise UserError(f"shards must have at least 1 byte, got {shard_bytes}")
    parts = find_parts(src, base, weights=weights)
    info = _info(Path(src), base, recipe)
    if to == "pipeline":
        if info.world != WORLD:
            raise UserError(
                f"{src} is a pipeline already, of the small world {info.world}: copy it"
            )
        parts.require("transformer", "vae", "text_encoder", "tokenizer")
    if loras or dtype is not None:
        info = replace(info, sha256="")  # of other numbers
    source = parts.source("transformer")
    config = wan_config(source)
    check_names(config, source)
    if to != "pipeline":
        _check_plain(config, to)
    change = merger(loras, source) if loras else None
    made = Conversion(parts, config, dtype, change, shard_bytes)
    if suffix:
        with replace_file(target) as temporary:
            made.self_forcing(temporary) if to == "self-forcing" else made.comfyui(temporary)
        return ["transformer"]
    _check_others(parts)
    with replace_folder(target) as temporary:
        if to == "diffusers":
            made.diffusers(temporary, _scheduler(src, base))
        elif to == "original":
            made.original(temporary)
        else:
            made.pipeline(temporary, info)
    names = ("transformer", "vae", "text_encoder", "tokenizer")
    return [name for name in names if getattr(parts, name) is not None]


def _info(src: Path, base: str | Path | None, recipe: str | None) -> ModelInfo:
    """What a pipeline made of `src` says of itself."""
    ours = (src / INDEX).is_file() and read_json(src / INDEX).get("format") == FORMAT
    if ours and recipe is None:
        return read_info(src)
    return wan_info(recipe or "teacher", None, [src] if base is None else [src, Path(base)])


def _check_others(parts: Parts) -> None:
    """UserError if VAE or text encoder are incomplete, where the libraries that know are there."""
    if parts.vae is not None and find_spec("diffusers"):
        check_vae(parts.vae)
    if parts.text_encoder is not None and find_spec("transformers"):
        check_umt5(parts.text_encoder)


def _check_plain(config: WanConfig, to: str) -> None:
    plain = WanConfig()
    for name in ("rope_theta", "prediction"):
        if getattr(config, name) != getattr(plain, name):
            raise UserError(
                f"this network has {name}={getattr(config, name)}, which the format {to} cannot "
                "say: others would read it wrongly; use pipeline"
            )


@dataclass(frozen=True)
class Conversion:
    """What is written, and how."""

    parts: Parts
    config: WanConfig
    dtype: torch.dtype | None
    change: Change | None
    shard_bytes: int

    def _transformer(self, name: Callable[[str], str] = lambda name: name) -> Renamed:
        source = self.parts.source("transformer")
        return Renamed(source, {name(n): n for n in source.places}, self.dtype, self.change)

    def diffusers(self, folder: Path, scheduler: Path | None) -> None:
        """Folders that diffusers' classes read; with all parts, what `WanPipeline` reads."""
        parts = self.parts
        self._transformer_folder(folder / "transformer")
        if parts.vae is not None:
            self._vae_folder(folder / "vae", parts.vae)
        if parts.text_encoder is not None:
            self._text_folder(folder / "text_encoder", parts.text_encoder)
        if parts.tokenizer is not None:
            shutil.copytree(parts.tokenizer, folder / "tokenizer")
        if scheduler is not None:
            shutil.copytree(scheduler, folder / "scheduler")
        if None in (parts.vae, parts.text_encoder, parts.tokenizer):
            return
        path = folder / "scheduler" / "scheduler_config.json"
        if scheduler is None:
            write_json(path, _SCHEDULER)
        solver = read_json(path).get("_class_name", _SCHEDULER["_class_name"])
        write_json(folder / "model_index.json", {**_WAN_INDEX, "scheduler": _diffusers(solver)})

    def original(self, folder: Path) -> None:
        """The layout of Wan 2.1's own release."""
        parts = self.parts
        write_json(
            folder / "config.json", {"_class_name": "WanModel", **original_json(self.config)}
        )
        write_shards(folder, STEM, self._transformer(_original), self.shard_bytes)
        if parts.vae is not None:
            rename = wan_keys.vae_to_original(parts.vae.places)
            _save_pt(folder / _VAE_FILE, _renamed(parts.vae, rename))
        if parts.text_encoder is not None:
            _save_pt(folder / _T5_FILE, _renamed(parts.text_encoder, wan_keys.umt5_to_original))
        if parts.tokenizer is not None:
            shutil.copytree(parts.tokenizer, folder / "google" / "umt5-xxl")

    def pipeline(self, folder: Path, info: ModelInfo) -> None:
        """A folder of `aad1.Pipeline`; the index comes last."""
        parts = self.parts
        assert parts.tokenizer is not None
        self._transformer_folder(folder / "transformer")
        self._vae_folder(folder / "codec", parts.source("vae"))
        text = parts.source("text_encoder")
        self._text_folder(folder / "text" / "text_encoder", text)
        shutil.copytree(parts.tokenizer, folder / "text" / "tokenizer")
        facts = {"length": 512, "dim": umt5_json(text)["d_model"], "encoder": "text_encoder"}
        write_json(folder / "text" / "config.json", {"_class_name": "Umt5Encoder", **facts})
        count = sum(math.prod(spec.shape) for spec in parts.source("transformer").specs.values())
        write_card(folder, info, count)
        write_info(folder, info)

    def self_forcing(self, file: Path) -> None:
        """One .pt as the Self-Forcing family publishes its generators."""
        tensors = dict(self._transformer(lambda name: f"model.{_original(name)}").read())
        torch.save({"generator": tensors, CONFIG_KEY: original_json(self.config)}, file)

    def comfyui(self, file: Path) -> None:
        """One safetensors file under the prefix by which ComfyUI knows a diffusion model."""
        prefix = "model.diffusion_model."
        tensors = dict(self._transformer(lambda name: prefix + _original(name)).read())
        write_tensors(file, tensors, metadata={CONFIG_KEY: json.dumps(original_json(self.config))})

    def _transformer_folder(self, folder: Path) -> None:
        write_json(folder / "config.json", transformer_json(self.config))
        write_shards(folder, STEM, self._transformer(), self.shard_bytes)

    def _vae_folder(self, folder: Path, source: Source) -> None:
        write_json(folder / "config.json", {"_class_name": "AutoencoderKLWan", **vae_json(source)})
        write_shards(folder, STEM, _as_it_is(source), self.shard_bytes)

    def _text_folder(self, folder: Path, source: Source) -> None:
        kind = {"architectures": ["UMT5EncoderModel"], "model_type": "umt5"}
        write_json(folder / "config.json", {**umt5_json(source), **kind})
        write_shards(folder, "model", _as_it_is(source), self.shard_bytes)


def original_json(config: WanConfig) -> dict[str, Any]:
    """A configuration in the words of Wan's own config.json."""
    return dict(
        _class_name="WanModel",
        model_type="t2v",
        dim=config.width,
        eps=config.eps,
        ffn_dim=config.ffn_dim,
        freq_dim=config.freq_dim,
        in_dim=config.in_channels,
        num_heads=config.num_attention_heads,
        num_layers=config.num_layers,
        out_dim=config.out_channels,
        text_len=512,
    )


def _as_it_is(source: Source) -> Renamed:
    return Renamed(source, {name: name for name in source.places})


def _original(name: str) -> str:
    new = wan_keys.dit_to_original(name)
    assert new is not None, name  # check_names has seen all of them
    return new


def _renamed(source: Source, rename: wan_keys.Rename) -> Renamed:
    names = {}
    for name in source.places:
        new = rename(name)
        if new is None:
            raise UserError(f"{source.where}: {name} is no name of this network")
        names[new] = name
    return Renamed(source, names)


def _save_pt(path: Path, tensors: Renamed) -> None:
    torch.save(dict(tensors.read()), path)


def _scheduler(*places: str | Path | None) -> Path | None:
    folders = [Path(place) / "scheduler" for place in places if place is not None]
    return next((f for f in folders if (f / "scheduler_config.json").is_file()), None)


def _diffusers(name: str) -> list[str]:
    return ["diffusers", name]


_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 5.0,
    "solver_order": 2,
    "final_sigmas_type": "zero",
}
_WAN_INDEX = {
    "_class_name": "WanPipeline",
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": _diffusers("WanTransformer3DModel"),
    "vae": _diffusers("AutoencoderKLWan"),
}
