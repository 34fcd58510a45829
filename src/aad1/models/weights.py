"""Reading and writing weights, strictly: every key present, expected and well shaped.

A network is built on the meta device, without memory, and filled tensor by tensor from its files
(`load_module`); it is written shard by shard (`write_shards`). Either way no more than one shard is
held beyond the network itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from aad1.atomic import replace_file
from aad1.errors import UserError
from aad1.models.dit import WanConfig, WanTransformer
from aad1.models.finite import check_finite, finite, total
from aad1.models.tensor_files import Source, Spec, TensorFile, open_tensors

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
SHARD_BYTES = 5_000_000_000
"""Files above this size are split."""
Change = Callable[[str, torch.Tensor], torch.Tensor]
"""(name, tensor as read) -> tensor to use, of the same shape."""
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
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors atomically, floating ones in `dtype` if given."""
    out = {}
    for key, value in tensors.items():
        value = value.detach().cpu()
        out[key] = (value.to(dtype) if dtype and value.is_floating_point() else value).contiguous()
    with replace_file(path) as temporary:
        save_file(out, temporary, metadata={"format": "pt", **(metadata or {})})


def load_strict(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict; UserError lists missing, unexpected, wrongly shaped and damaged keys."""
    _check_shapes(module, {name: tuple(value.shape) for name, value in tensors.items()}, source)
    check_finite(tensors, {name: total(value) for name, value in tensors.items()}, source)
    module.load_state_dict(dict(tensors))


def _check_shapes(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str, reasons: str = ""
) -> None:
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    problems = []
    for title, keys in (
        ("missing", own.keys() - shapes.keys()),
        ("unexpected", shapes.keys() - own.keys()),
    ):
        if keys:
            some = ", ".join(sorted(keys)[:3])
            problems.append(f"{len(keys)} {title} ({some}{', ...' if len(keys) > 3 else ''})")
    for key in sorted(own.keys() & shapes.keys()):
        if own[key] != shapes[key]:
            problems.append(f"{key} is {list(shapes[key])}, expected {list(own[key])}")
            break
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}{reasons}")


def check_fit(module: nn.Module, source: Source) -> None:
    """UserError unless names and shapes are those of the module; no number is read."""
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    tied = _tied(module)
    for name in source.places:
        shapes |= dict.fromkeys(tied.get(name, ()), shapes[name])
    _check_shapes(module, shapes, str(source.where), source.reasons)


def _tied(module: nn.Module) -> dict[str, list[str]]:
    """All names of the tensor that has a name."""
    by_tensor: dict[int, list[str]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        by_tensor.setdefault(id(value), []).append(name)
    return {name: names for names in by_tensor.values() for name in names}


def load_module(
    module: nn.Module,
    source: Source,
    device: torch.device | str = "cpu",
    change: Change | None = None,
) -> None:
    """Fill a module that was built on the meta device, one tensor at a time, file by file.

    Each tensor takes the dtype that the module's own has, so that `module.to(dtype)` on the meta
    device settles the precision. Tied parameters stay tied.
    change: applied to each tensor on `device` before the cast (merging a LoRA).

    UserError before anything is read if names or shapes do not fit, and at the end if there are
    numbers that are not finite.
    """
    check_fit(module, source)
    own, tied = module.state_dict(keep_vars=True), _tied(module)
    totals: dict[str, torch.Tensor] = {}
    for name, tensor in source.read():
        if change is not None:
            tensor = change(name, tensor.to(device))
        # A copy, since what is read is a view of the file.
        value = tensor.to(device=device, dtype=own[name].dtype, copy=True)
        if value.is_floating_point():
            totals[name] = total(value)
        parameter = nn.Parameter(value, requires_grad=own[name].requires_grad)
        for other in tied[name]:
            parent, _, leaf = other.rpartition(".")
            holder = module.get_submodule(parent)
            if leaf in holder._parameters:
                holder._parameters[leaf] = parameter
            else:
                holder._buffers[leaf] = value
    check_finite(module.state_dict(), totals, str(source.where))


class LazyTensors(Protocol):
    """Named tensors that are read when asked for (`Source` is one)."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Shape and dtype by name, in the order to write them."""
        ...

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of those names, in any order."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A state dict as `LazyTensors`: floating tensors in `dtype` if given."""

    tensors: Mapping[str, torch.Tensor]
    dtype: torch.dtype | None = None

    def _dtype(self, value: torch.Tensor) -> torch.dtype:
        return self.dtype if self.dtype and value.is_floating_point() else value.dtype

    @property
    def specs(self) -> dict[str, Spec]:
        return {k: Spec(tuple(v.shape), self._dtype(v)) for k, v in self.tensors.items()}

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.tensors if names is None else names:
            value = self.tensors[name].detach().cpu()
            cast = value.to(self._dtype(value))
            if cast is not value and not finite(cast) and finite(value):
                raise UserError(f"{name} has numbers that {cast.dtype} cannot hold")
            yield name, cast


def write_shards(folder: Path, stem: str, tensors: LazyTensors, limit: int = SHARD_BYTES) -> None:
    """Write `stem`.safetensors, or above `limit` bytes numbered shards with an index.

    Names and index are those of diffusers and transformers. One shard is held at a time.
    """
    specs = tensors.specs
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.bytes
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / f"{stem}.safetensors.index.json"
    if len(shards) == 1:
        index.unlink(missing_ok=True)  # of an earlier, larger model: it would be read first
        write_tensors(folder / f"{stem}.safetensors", dict(tensors.read()))
        return
    files = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        write_tensors(folder / file, dict(tensors.read(names)))
    total = sum(spec.bytes for spec in specs.values())
    weight_map = {name: f for f, names in zip(files, shards, strict=True) for name in names}
    write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})


def index_files(index: Path) -> list[Path]:
    """The shards that an index names, whether they are there or not."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise UserError(f"{index} has no weight_map from keys to files")
    return [index.parent / name for name in sorted(set(shards.values()))]


def transformer_json(config: WanConfig) -> dict[str, Any]:
    """config.json of a diffusers `WanTransformer3DModel` (and our own fields if they differ)."""
    raw = {**_FIXED, **asdict(config)}
    raw["patch_size"] = list(config.patch_size)
    for name in _OWN:
        if raw[name] == WanConfig.__dataclass_fields__[name].default:
            del raw[name]
    return raw


def save_transformer(
    model: WanTransformer, folder: Path, dtype: torch.dtype | None, limit: int = SHARD_BYTES
) -> None:
    """Write a folder that diffusers' `WanTransformer3DModel.from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", transformer_json(model.config))
    write_shards(folder, STEM, InMemory(model.state_dict(), dtype), limit)


def read_transformer_config(raw: Mapping[str, Any], path: Path) -> WanConfig:
    """The fields of a config.json that are ours, type-checked; missing ones keep their default."""
    for key in ("image_dim", "added_kv_proj_dim"):
        if raw.get(key) is not None:
            raise UserError(
                f"{path}: {key}={raw[key]}: Wan image-to-video with a CLIP image branch is not "
                "supported"
            )
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


def load_transformer(
    folder: Path, dtype: torch.dtype | None, device: torch.device
) -> WanTransformer:
    """Build a `WanTransformer` from such a folder (one file, or shards with an index)."""
    path = folder / "config.json"
    config = read_transformer_config(read_json(path), path)
    index = folder / f"{WEIGHTS}.index.json"
    files = index_files(index) if index.exists() else [folder / WEIGHTS]
    places: dict[str, tuple[TensorFile, str]] = {}
    for file in map(open_tensors, files):
        places |= {name: (file, name) for name in file.specs}
    return build_transformer(config, Source(folder, places), dtype, device)


def check_names(config: WanConfig, source: Source) -> None:
    """UserError if a transformer of that configuration would not take the tensors of `source`."""
    with torch.device("meta"):
        check_fit(WanTransformer(config), source)


def build_transformer(
    config: WanConfig,
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device | str,
    change: Change | None = None,
) -> WanTransformer:
    """A transformer of that configuration with the tensors of `source`; float32 by default."""
    with torch.device("meta"):
        model = WanTransformer(config).cast(dtype or torch.float32)
    load_module(model, source, device, change)
    return model.eval()
