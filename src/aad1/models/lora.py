"""LoRA files for Wan, merged into the weights while these are read.

Of each linear layer a file changes W to W + scale (alpha / r) B A, with A [r, in] and B [out, r].
Read are the forms in use, told apart by names:

- diffusers and PEFT: `transformer.blocks.0.attn1.to_q.lora_A.weight`, `lora_B`; alpha in the
  metadata or in an adapter_config.json beside the file, else alpha = r;
- ComfyUI: `diffusion_model.blocks.0.self_attn.q.lora_down.weight`, `lora_up`, `alpha`, and whole
  differences `diff` (of a weight), `diff_b` (of a bias) and `diff_m` (of a block's or the head's
  modulation); original or diffusers' layer names;
- kohya's: `lora_unet_blocks_0_self_attn_q.lora_down.weight`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aad1.errors import UserError
from aad1.models import wan_keys
from aad1.models.tensor_files import PICKLES, SAFETENSORS, Source, TensorFile, open_tensors
from aad1.models.weights import Change, read_json

_PREFIX = re.compile(r"^(base_model\.|model\.|transformer\.|diffusion_model\.|generator\.)")
_NAME = re.compile(
    r"^(?P<layer>.+?)\."
    r"(?:lora_(?P<factor>A|B|down|up)(?:\.(?!weight|bias)\w+)?\.(?P<leaf>weight|bias)"
    r"|(?P<whole>alpha|diff_b|diff_m|diff))$"
)
_ROLES = {"A": "down", "B": "up"}


@dataclass(frozen=True)
class Lora:
    """The tensors of a LoRA file, by layer (as the file names it) and role.

    Roles: "down" [r, in], "up" [out, r], "up_bias" [out], "alpha" [], "diff", "diff_b".
    """

    path: Path
    layers: Mapping[str, Mapping[str, torch.Tensor]]
    settings: Mapping[str, Any]
    """PEFT's configuration, if the file has one: lora_alpha, alpha_pattern, use_rslora."""

    def factor(self, layer: str) -> float:
        """alpha / r of a layer (alpha / sqrt(r) if the settings say so)."""
        parts = self.layers[layer]
        rank = parts["down"].shape[0]
        alpha: float = rank
        if "alpha" in parts:
            alpha = float(parts["alpha"])
        elif "lora_alpha" in self.settings:
            alpha = float(self.settings["lora_alpha"])
            for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
                if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                    alpha = float(value)
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def read_lora(path: str | Path) -> Lora:
    """Open a LoRA file, or a folder that holds one.

    UserError if it is none, or of a kind that cannot be merged (DoRA, LoHa, LoKr), which is named.
    """
    path = Path(path)
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix in (*SAFETENSORS, *PICKLES)]
        if len(files) != 1:
            raise UserError(f"{path} must hold one LoRA file, it has {len(files)}")
        path = files[0]
    file = open_tensors(path)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in file.read(file.specs):
        name = wan_keys.strip_prefixes(key)
        while (found := _PREFIX.match(name)) is not None:
            name = name[found.end() :]
        match = _NAME.match(name)
        if match is None:
            raise UserError(f"{path} is no LoRA that can be merged: it has {key}")
        factor, leaf, whole = match.group("factor", "leaf", "whole")
        role = whole or _ROLES.get(factor, factor) + ("_bias" if leaf == "bias" else "")
        layer = match["layer"]
        if role == "diff_m":
            role, layer = "diff", f"{layer}.modulation"
        layers.setdefault(layer, {})[role] = tensor
    for layer, parts in layers.items():
        if ("down" in parts) != ("up" in parts) or "down_bias" in parts:
            raise UserError(f"{path}: {layer} has {', '.join(sorted(parts))}: a pair is incomplete")
    return Lora(path, layers, _settings(file))


def _settings(file: TensorFile) -> dict[str, Any]:
    beside = file.path.parent / "adapter_config.json"
    if beside.is_file():
        return read_json(beside)
    try:
        stored = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError:
        return {}
    return {str(key).removeprefix("transformer."): value for key, value in stored.items()}


def merger(loras: Sequence[tuple[str | Path | Lora, float]], model: Source) -> Change:
    """A function (name, tensor) -> tensor with the LoRAs added in float32.

    loras: (file, scale). model: the transformer they are merged into, in diffusers' names.

    UserError if a LoRA changes layers that the model does not have, or of other shapes.
    """
    # Of each parameter: its updates as (tensors, factor).
    updates: dict[str, list[tuple[tuple[torch.Tensor, ...], float]]] = {}
    specs = model.specs
    for given, scale in loras:
        lora = given if isinstance(given, Lora) else read_lora(given)
        if not math.isfinite(scale):
            raise UserError(f"the scale of {lora.path} must be a finite number, got {scale}")
        layers = _layers(lora.layers, specs)
        unknown = [layer for layer in lora.layers if layer not in layers]
        if unknown:
            raise UserError(
                f"{lora.path} changes {len(unknown)} layers that {model.where} does not have "
                f"({', '.join(unknown[:3])})"
            )
        for layer, parts in lora.layers.items():
            weight = f"{layers[layer]}.weight"
            weight = weight if weight in specs else layers[layer]
            bias = f"{layers[layer]}.bias"
            pairs: list[tuple[str, tuple[torch.Tensor, ...], float]] = []
            if "down" in parts:
                factor = scale * lora.factor(layer)
                pairs.append((weight, (parts["up"], parts["down"]), factor))
                if "up_bias" in parts:
                    pairs.append((bias, (parts["up_bias"],), factor))
            if "diff" in parts:
                pairs.append((weight, (parts["diff"],), scale))
            if "diff_b" in parts:
                pairs.append((bias, (parts["diff_b"],), scale))
            for name, tensors, factor in pairs:
                _check_shape(lora, layer, tensors, name, specs[name].shape if name in specs else ())
                updates.setdefault(name, []).append((tensors, factor))

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in updates:
            return tensor
        value = tensor.float()
        for parts, factor in updates[name]:
            here = [p.to(value.device, torch.float32) for p in parts]
            # A convolution's factors have further dimensions: [r, in, 1, 2, 2], [out, r, 1, 1, 1].
            delta = here[0] if len(here) == 1 else here[0].flatten(1) @ here[1].flatten(1)
            value = value + factor * delta.reshape(value.shape)
        return value

    return change


def _layers(names: Iterable[str], specs: Mapping[str, Any]) -> dict[str, str]:
    """A LoRA's layer names -> the model's (diffusers'), for those that the model has."""
    layers = {name.removesuffix(".weight") for name in specs if not name.endswith(".bias")}
    known = {layer: layer for layer in layers}
    for layer in layers:
        original = wan_keys.dit_to_original(layer)
        for name in (layer, original):
            if name is not None:
                known[name] = layer
                known["lora_unet_" + name.replace(".", "_")] = layer
    return {name: known[name] for name in names if name in known}


def _check_shape(
    lora: Lora, layer: str, tensors: Sequence[torch.Tensor], name: str, shape: tuple[int, ...]
) -> None:
    sizes = [tuple(t.shape) for t in tensors]
    if not shape:
        raise UserError(f"{lora.path}: {layer}: the model has no {name}")
    if len(tensors) == 1:
        fits = tensors[0].numel() == math.prod(shape) and sizes[0][0] == shape[0]
    else:
        up, down = tensors[0].flatten(1), tensors[1].flatten(1)
        fits = (up.shape[0], down.shape[1]) == (shape[0], math.prod(shape[1:]))
        fits = fits and up.shape[1] == down.shape[0]
    if not fits:
        given = " and ".join(str(list(s)) for s in sizes)
        raise UserError(
            f"{lora.path} is for a model of another size: {layer} has {given}, "
            f"the weight is {list(shape)}"
        )
