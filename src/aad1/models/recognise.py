"""Which network a file holds, by the names of its tensors, whatever the file is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from aad1.errors import UserError
from aad1.models import wan_keys
from aad1.models.tensor_files import Source, TensorFile

PARTS = {
    "transformer": "Wan transformer",
    "vae": "Wan VAE",
    "text_encoder": "UMT5 text encoder",
}
"""Networks that a model is made of, and what they are called."""

# What most names of a file must match for it to be of a kind.
_NAMES = {
    "lora": r"\.(lora_(A|B|up|down|magnitude_vector)|alpha|diff(_[bm])?|hada_|lokr_)\b|^lora_unet",
    "transformer": r"patch_embedding|(text|time)_embedding\.|time_projection|head\.|"
    r"condition_embedder|proj_out\.|scale_shift_table|modulation|"
    r"blocks\.\d+\.(self_attn|cross_attn|attn[12]|norm[23]\.|ffn\.(0|2|net)|scale_shift|modul)",
    "vae": r"(post_)?quant_conv|conv[12]\.|(encoder|decoder)\."
    r"(conv|downsamples|upsamples|middle|head|down_blocks|up_blocks|mid_block|norm_out)",
    "text_encoder": r"token_embedding|blocks\.\d+\.(attn|pos_embedding|ffn\.(gate|fc)|norm[12]\.)|"
    r"norm\.weight|shared\.|encoder\.(block|embed_tokens|final_layer_norm)",
}
# Names that files of a kind may have and that the network has no use for.
_IGNORED = {"text_encoder": r"^(decoder\.|lm_head|spiece_model|logit_scale)"}


def recognise(
    files: Sequence[TensorFile], where: Path, config: dict[str, Any]
) -> tuple[str, Source]:
    """(kind, source under the names of diffusers and transformers) of files of one network."""
    places: dict[str, tuple[TensorFile, str]] = {}
    for file in files:
        for key in file.specs:
            name = wan_keys.strip_prefixes(key)
            if name in places:
                raise UserError(
                    f"{where} has {name} twice, in {places[name][0].path.name} and {file.path.name}"
                )
            places[name] = (file, key)
        config = dict(file.config) or config
    kind = kind_of(places)
    rename = _renaming(kind, places)
    ignored = _IGNORED.get(kind)
    renamed = {
        rename(name) or name: place
        for name, place in places.items()
        if ignored is None or not re.match(ignored, name)
    }
    if kind == "text_encoder" and "encoder.embed_tokens.weight" in renamed:
        embedding = renamed.pop("encoder.embed_tokens.weight")  # one tensor under two names
        renamed.setdefault("shared.weight", embedding)
    return kind, Source(where, renamed, config)


def kind_of(names: Iterable[str]) -> str:
    """The kind that explains most names, or "" if none explains half of them."""
    stripped = [wan_keys.strip_prefixes(name) for name in names]
    if any(re.search(_NAMES["lora"], name) for name in stripped):
        return "lora"
    counts = {
        kind: sum(re.match(pattern, name) is not None for name in stripped)
        for kind, pattern in _NAMES.items()
    }
    best = max(counts, key=lambda kind: counts[kind])
    return best if 2 * counts[best] >= len(stripped) else ""


def _renaming(kind: str, names: Iterable[str]) -> Callable[[str], str | None]:
    """From original names; a name that is one of diffusers' or transformers' already has none."""
    if kind == "transformer":
        return wan_keys.dit_from_original
    if kind == "vae":
        return wan_keys.vae_from_original(names)
    return wan_keys.umt5_from_original if kind == "text_encoder" else lambda name: None


def group_shards(files: Sequence[TensorFile], problems: list[str]) -> list[list[TensorFile]]:
    """Files of one kind that no index names: shards of one network if no name occurs twice."""
    whole: list[TensorFile] = []
    for file in files:
        number = re.search(r"^(.*)(\d{5})-of-(\d{5})", file.path.name)
        if number is not None:
            folder, (stem, _, count) = file.path.parent, number.groups()
            wanted = [f"{stem}{i + 1:05}-of-{count}{file.path.suffix}" for i in range(int(count))]
            there = {f.path.name for f in files}
            if gone := [name for name in wanted if name not in there]:
                problems.append(f"{folder / gone[0]} does not exist, one of {int(count)} shards")
                continue
        whole.append(file)
    names = [{wan_keys.strip_prefixes(name) for name in f.specs} for f in whole]
    if any(a & b for a, b in combinations(names, 2)):
        return [[file] for file in whole]
    return [whole] if whole else []


def unrecognised(path: Path, kind: str, source: Source) -> str:
    """Why a file is no part of a model."""
    if kind == "lora":
        return f"{path} is a LoRA, not a model: give it beside one (--lora)"
    some = ", ".join(list(source.places)[:3])
    return f"{path} holds no Wan transformer, VAE or UMT5 encoder (its first names: {some})"
