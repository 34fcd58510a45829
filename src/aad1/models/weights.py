"""Reading and writing weight folders, strictly: every key present, expected and well shaped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from aad1.atomic import replace_file
from aad1.errors import UserError
from aad1.models.dit import WanConfig, WanTransformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
_FIXED = {
    "_class_name": "WanTransformer3DModel",
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}
_OWN = ("rope_theta", "prediction")  # fields that diffusers does not know


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError if it is missing or malformed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file; UserError if it is missing, truncated or corrupt."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as f:  # type: ignore[no-untyped-call]
            return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from None


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write tensors atomically, floating ones in `dtype` if given."""
    out = {}
    for key, value in tensors.items():
        value = value.detach().cpu()
        out[key] = (value.to(dtype) if dtype and value.is_floating_point() else value).contiguous()
    with replace_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors makes files of 0600
        save_file(out, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)


def load_strict(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict; UserError lists missing, unexpected and wrongly shaped keys."""
    own = module.state_dict()
    problems = []
    for title, keys in (
        ("missing", own.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - own.keys()),
    ):
        if keys:
            some = ", ".join(sorted(keys)[:3])
            problems.append(f"{len(keys)} {title} ({some}{', ...' if len(keys) > 3 else ''})")
    for key in sorted(own.keys() & tensors.keys()):
        if own[key].shape != tensors[key].shape:
            problems.append(f"{key} is {list(tensors[key].shape)}, expected {list(own[key].shape)}")
            break
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}")
    module.load_state_dict(dict(tensors))


def save_transformer(model: WanTransformer, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a folder that diffusers' `WanTransformer3DModel.from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_FIXED, **asdict(model.config)}
    config["patch_size"] = list(model.config.patch_size)
    for name in _OWN:
        if config[name] == WanConfig.__dataclass_fields__[name].default:
            del config[name]
    write_json(folder / "config.json", config)
    write_tensors(folder / WEIGHTS, model.state_dict(), dtype)


def _read_config(raw: Mapping[str, Any], path: Path) -> WanConfig:
    """The fields of a config.json that are ours, type-checked; missing ones keep their default."""
    values: dict[str, Any] = {}
    for f in fields(WanConfig):
        value = raw.get(f.name, f.default)
        if isinstance(f.default, tuple):
            value = tuple(value) if isinstance(value, list) else value
            fits = isinstance(value, tuple) and all(type(v) is int for v in value)
        elif isinstance(f.default, float):
            fits = type(value) in (int, float)
        else:
            fits = type(value) is type(f.default)
        if not fits:
            raise UserError(f"{path}: {f.name} must be like {f.default!r}, got {value!r}")
        values[f.name] = value
    try:
        return WanConfig(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _weight_files(folder: Path) -> list[str]:
    index = folder / f"{WEIGHTS}.index.json"
    if not index.exists():
        return [WEIGHTS]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise UserError(f"{index} has no weight_map from keys to files")
    return sorted(set(shards.values()))


def load_transformer(
    folder: Path, dtype: torch.dtype | None, device: torch.device
) -> WanTransformer:
    """Build a `WanTransformer` from such a folder (one file, or shards with an index)."""
    raw = read_json(folder / "config.json")
    for key in ("image_dim", "added_kv_proj_dim"):
        if raw.get(key) is not None:
            raise UserError(f"{folder}: {key}={raw[key]}: models with an image branch don't fit")
    with torch.device("meta"):
        model = WanTransformer(_read_config(raw, folder / "config.json"))
    names = _weight_files(folder)
    model.to_empty(device="cpu")
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors |= read_tensors(folder / name)
    load_strict(model, tensors, str(folder))
    return model.cast(dtype or torch.float32).to(device).eval()
