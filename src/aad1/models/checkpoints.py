"""Wan weights as they are found on disk: which networks a path holds, and loading them.

A file is known by its names and shapes, never by what it is called. Read are

- diffusers folders (`transformer/ vae/ text_encoder/ tokenizer/`), one file or shards with
  an index;
- the original layout (`diffusion_pytorch_model*.safetensors`, `Wan2.1_VAE.pth`, `models_t5_*.pth`,
  `google/umt5-xxl/`);
- generators of the Self-Forcing family: .pt files with `generator_ema`, `generator`, `model` or
  `critic`, or a folder of .pt shards, which are merged;
- single files with original or diffusers names, with ComfyUI's prefixes or without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aad1.errors import UserError
from aad1.models import wan_keys, wan_shapes
from aad1.models.dit import WanConfig, WanTransformer
from aad1.models.lora import Lora, merger
from aad1.models.tensor_files import (
    PICKLES,
    SAFETENSORS,
    Source,
    TensorFile,
    open_tensors,
    refuse_distributed,
)
from aad1.models.weights import (
    build_transformer,
    check_fit,
    index_files,
    load_module,
    read_json,
    read_transformer_config,
)

if TYPE_CHECKING:
    from aad1.models.wan_codec import WanCodec

PART_NAMES = ("transformer", "vae", "text_encoder")
_SEEN = {"transformer": "Wan transformer", "vae": "Wan VAE", "text_encoder": "UMT5 text encoder",
         "lora": "LoRA"}  # fmt: skip
_ATTENTION = r"blocks\.\d+\.{}\.(q|k|v|o|norm_q|norm_k|to_q|to_k|to_v|to_out\.0)\."
# What most names of a file must match for it to be of a kind.
_KINDS = {
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


@dataclass(frozen=True)
class Parts:
    """What a path (and its base) holds; None where there is nothing."""

    transformer: Source | None
    vae: Source | None
    text_encoder: Source | None
    tokenizer: Path | None
    looked: tuple[Path, ...] = ()
    """Folders and files that were searched."""
    problems: tuple[str, ...] = ()
    """Why files there could not be used."""
    unread: tuple[str, ...] = ()
    """Those of `problems` that are of files which could not be opened: any part may be in them."""

    def require(self, *names: str) -> None:
        """UserError that lists which of these parts are missing and where they were looked for."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            text = _missing(", ".join(missing), self.looked, self.problems)
            alone = self.transformer is not None and not self.unread
            raise UserError(text + "; a base folder can supply what is missing" * alone)

    def source(self, name: str) -> Source:
        """That part; UserError as `require` if it is missing."""
        self.require(name)
        found = getattr(self, name)
        assert isinstance(found, Source)
        return found


def _missing(what: str, looked: Sequence[Path], problems: Sequence[str]) -> str:
    text = f"no {what} found; looked in {', '.join(map(str, looked))}"
    return text + (f" ({'; '.join(problems)})" if problems else "")


def find_parts(path: str | Path, base: str | Path | None = None, *, weights: str = "") -> Parts:
    """Find transformer, VAE, text encoder and tokenizer in a file or folder, without reading them.

    base: another path that fills what `path` lacks; never the transformer, and nothing that may be
        in a file of `path` that could not be opened.
    weights: which state dict of a .pt that holds several; "" prefers the moving average.

    UserError if there is nothing, a file has several candidates for a part, or the parts do not
    belong together.
    """
    parts = _find(Path(path), weights)
    if base is not None:
        parts.require("transformer")  # a generator that is damaged is not to become its teacher
        more = _find(Path(base), "")
        for name in ("vae", "text_encoder"):
            if parts.unread and getattr(parts, name) is None and getattr(more, name) is not None:
                raise UserError(
                    f"the {name} is not taken from {base}, as it may be in a file of {path} that "
                    f"cannot be read; mend or remove that: {'; '.join(parts.unread)}"
                )
        parts = Parts(
            transformer=parts.transformer,
            vae=parts.vae or more.vae,
            text_encoder=parts.text_encoder or more.text_encoder,
            tokenizer=parts.tokenizer or more.tokenizer,
            looked=parts.looked + more.looked,
            problems=parts.problems + more.problems,
            unread=more.unread,
        )
    _check_together(parts)
    return parts


def _find(path: Path, weights: str) -> Parts:
    if path.is_file():
        kind, source = _recognise([open_tensors(path, weights)], path, _config(path.parent))
        if kind not in PART_NAMES:
            raise UserError(_unrecognised(path, kind, source))
        return _parts({kind: source}, None, (path,))
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    problems: list[str] = []
    others: list[str] = []
    looked: list[Path] = []
    found: dict[str, Source] = {}
    # Deeper folders count only for what the shallower ones do not have.
    for level in ([path, *_folders(path)], [f for p in _folders(path) for f in _folders(p)]):
        candidates: dict[str, list[Source]] = {n: [] for n in PART_NAMES if n not in found}
        if not candidates:
            break
        looked += level
        for folder in level:
            refuse_distributed(folder)
            for kind, source in _sources(folder, weights, problems):
                if kind in candidates:
                    candidates[kind].append(source)
                elif folder == path and kind not in PART_NAMES:
                    others.append(_unrecognised(source.where, kind, source))
        for kind, sources in candidates.items():
            if len(sources) > 1:
                where = ", ".join(str(s.where) for s in sources)
                more = " (Wan 2.2's two are not supported)" if kind == "transformer" else ""
                raise UserError(
                    f"{path} holds {len(sources)} networks that are each a {_SEEN[kind]}: {where}; "
                    f"give the path of one{more}"
                )
            if sources:
                found[kind] = sources[0]
    tokenizer = _tokenizer(path)
    if tokenizer is None and not found:
        raise UserError(_missing("Wan weights", looked, problems + others))
    return _parts(found, tokenizer, looked, problems, others)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] not in "._")


def _parts(
    found: Mapping[str, Source],
    tokenizer: Path | None,
    looked: Sequence[Path],
    unread: Sequence[str] = (),
    others: Sequence[str] = (),
) -> Parts:
    transformer, vae, text_encoder = (found.get(name) for name in PART_NAMES)
    return Parts(
        transformer, vae, text_encoder, tokenizer, tuple(looked), (*unread, *others), tuple(unread)
    )


def _sources(folder: Path, weights: str, problems: list[str]) -> list[tuple[str, Source]]:
    """The networks whose files lie in `folder` itself, each with its kind.

    Files that cannot be used are left out, and `problems` gets a line on each.
    """
    config = _config(folder)
    before = len(problems)
    found: list[tuple[str, Source]] = []
    indexed: set[Path] = set()
    for index in sorted(folder.glob("*.index.json")):
        try:
            files = index_files(index)
            indexed.update(files)
            found.append(_recognise([open_tensors(f) for f in files], folder, config))
        except UserError as error:
            problems.append(f"{index.name}: {error}")
    loose: dict[str, list[TensorFile]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix not in (*SAFETENSORS, *PICKLES) or file in indexed or not file.is_file():
            continue
        try:
            opened = open_tensors(file, weights if file.suffix in PICKLES else "")
        except UserError as error:
            problems.append(str(error))
            continue
        loose.setdefault(_kind(opened.specs), []).append(opened)
    for kind, same in loose.items():
        for group in _group(same, problems) if kind in PART_NAMES else [[f] for f in same]:
            where = folder if len(group) > 1 else group[0].path
            found.append(_recognise(group, where, config))
    beside = tuple(problems[before:])
    return [(kind, replace(source, beside=beside)) for kind, source in found]


def _group(files: Sequence[TensorFile], problems: list[str]) -> list[list[TensorFile]]:
    """Files of one kind that no index names: shards of one network if no name occurs twice."""
    whole: list[TensorFile] = []
    for file in files:
        number = re.search(r"^(.*)(\d{5})-of-(\d{5})", file.path.name)
        if number is not None:
            folder, (stem, _, count) = file.path.parent, number.groups()
            shards = [f"{stem}{i + 1:05}-of-{count}{file.path.suffix}" for i in range(int(count))]
            there = {f.path.name for f in files}
            if gone := [name for name in shards if name not in there]:
                problems.append(f"{folder / gone[0]} does not exist, one of {int(count)} shards")
                continue
        whole.append(file)
    names = [{wan_keys.strip_prefixes(name) for name in f.specs} for f in whole]
    if any(a & b for a, b in combinations(names, 2)):
        return [[file] for file in whole]
    return [whole] if whole else []


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def _kind(names: Iterable[str]) -> str:
    """The kind that explains most names, or "" if none explains half of them."""
    stripped = [wan_keys.strip_prefixes(name) for name in names]
    if any(re.search(_KINDS["lora"], name) for name in stripped):
        return "lora"
    counts = {
        kind: sum(re.match(pattern, name) is not None for name in stripped)
        for kind, pattern in _KINDS.items()
    }
    best = max(counts, key=lambda kind: counts[kind])
    return best if 2 * counts[best] >= len(stripped) else ""


def _recognise(
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
    kind = _kind(places)
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


def _renaming(kind: str, names: Iterable[str]) -> Callable[[str], str | None]:
    """From original names; a name that is one of diffusers' or transformers' already has none."""
    if kind == "transformer":
        return wan_keys.dit_from_original
    if kind == "vae":
        return wan_keys.vae_from_original(names)
    return wan_keys.umt5_from_original if kind == "text_encoder" else lambda name: None


def _unrecognised(path: Path, kind: str, source: Source) -> str:
    if kind == "lora":
        return f"{path} is a LoRA, not a model: give it beside one (--lora)"
    some = ", ".join(list(source.places)[:3])
    return f"{path} holds no Wan transformer, VAE or UMT5 encoder (its first names: {some})"


def _tokenizer(path: Path) -> Path | None:
    """The folder of UMT5's tokenizer, at most two levels down; not that of CLIP's XLM-RoBERTa."""
    for folder in (path, *_folders(path), *(f for p in _folders(path) for f in _folders(p))):
        named = [folder / n for n in ("spiece.model", "tokenizer.json", "tokenizer_config.json")]
        if any(p.is_file() for p in named) and not (folder / "sentencepiece.bpe.model").exists():
            return folder
    return None


def _check_together(parts: Parts) -> None:
    """UserError if the parts' shapes show that they belong to different models."""
    if parts.transformer is None:
        return
    specs = parts.transformer.specs
    pairs = (
        (parts.text_encoder, "shared.weight", 1,
         "condition_embedder.text_embedder.linear_1.weight", "text width"),
        (parts.vae, "post_quant_conv.weight", 0, "patch_embedding.weight", "latent channels"),
    )  # fmt: skip
    for source, theirs, axis, ours, what in pairs:
        if source is None or theirs not in source.specs or ours not in specs:
            continue
        own, other = specs[ours].shape[1], source.specs[theirs].shape[axis]
        if own != other and not (what == "latent channels" and own in wan_shapes.CHANNELS):
            raise UserError(
                f"{parts.transformer.where} and {source.where} do not belong together: "
                f"{what} {own} and {other}"
            )


# ---- loading ------------------------------------------------------------------------------------


def _source(source: Source | str | Path, part: str) -> Source:
    """A source as it is, or that part of a path; UserError says what is there instead."""
    if isinstance(source, Source):
        return source
    parts = find_parts(source)
    if getattr(parts, part) is None and not parts.unread:
        there = [_SEEN[name] for name in PART_NAMES if getattr(parts, name) is not None]
        if there:
            raise UserError(f"{source} holds a {' and a '.join(there)}, not a {_SEEN[part]}")
    return parts.source(part)


def wan_source(path: str | Path) -> Source:
    """The transformer in a file or folder, as lazily read tensors under diffusers' names."""
    return _source(path, "transformer")


def wan_config(source: Source) -> WanConfig:
    """The configuration of a transformer, from diffusers' config.json if there is one."""
    if source.config.get("_class_name") == "WanTransformer3DModel":
        wan_shapes.check_one_model(source)
        folder = source.where if source.where.is_dir() else source.where.parent
        config = read_transformer_config(source.config, folder / "config.json")
        wan_shapes.check_variant(source)
        wan_shapes.check_width(source, config.width)
        return config
    return wan_shapes.transformer_config(source)


def load_wan_transformer(
    source: Source | str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    loras: Sequence[tuple[str | Path | Lora, float]] = (),
) -> WanTransformer:
    """A Wan transformer of any size from any of the formats above.

    dtype: of all weights; float32 by default.
    loras: (file, scale) in the order to merge them (`aad1.models.lora`).

    Beside the network itself, no more than one file is held in memory. UserError for a variant
    that is not supported, mixed-up or missing parts, names or shapes that do not fit.
    """
    source = _source(source, "transformer")
    config = wan_config(source)
    change = merger(loras, source) if loras else None
    return build_transformer(config, source, dtype, device, change)


def vae_json(source: Source) -> dict[str, Any]:
    """Arguments of diffusers' `AutoencoderKLWan`: config.json if it has them, else from shapes."""
    shapes = wan_shapes.vae_config(source)
    if source.config.get("_class_name") != "AutoencoderKLWan":
        return shapes
    return {k: v for k, v in source.config.items() if not k.startswith("_")}


def load_wan_vae(
    source: Source | str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> WanCodec:
    """Wan's video autoencoder; float32 by default. Needs diffusers."""
    from aad1.models.wan_codec import WanCodec

    source = _source(source, "vae")
    vae = _empty_vae(source)
    nn.Module.to(vae, dtype or torch.float32)  # diffusers' own warns of a cast that is meant
    load_module(vae, source, device)
    return WanCodec(vae.eval()).to(device).eval()


def _empty_vae(source: Source) -> nn.Module:
    from aad1.models.wan_codec import autoencoder_class

    with torch.device("meta"):
        return autoencoder_class().from_config(vae_json(source))  # type: ignore[no-any-return]


def check_vae(source: Source) -> None:
    """UserError if tensors of the VAE are missing, unexpected or of other shapes. Needs
    diffusers."""
    check_fit(_empty_vae(source), source)


def umt5_json(source: Source) -> dict[str, Any]:
    """Arguments of transformers' `UMT5Config`: config.json's, with what shapes tell on top."""
    wan_shapes.check_variant(source)
    own = source.config if source.config.get("model_type") == "umt5" else {}
    return {**own, **wan_shapes.umt5_config(source)}


def load_umt5_state(
    source: Source | str | Path,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(arguments of `UMT5Config`, state dict of `UMT5EncoderModel`) of the text encoder.

    The tensors are views of the mapped files, in the files' precision: nothing is read before it is
    used. To fill an encoder that was built on the meta device, see also `umt5_source` and
    `aad1.models.weights.load_module`.
    """
    source = umt5_source(source)
    state = dict(source.read())
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    return umt5_json(source), state


def umt5_source(source: Source | str | Path) -> Source:
    """The text encoder as lazily read tensors under the names of `UMT5EncoderModel`."""
    return _source(source, "text_encoder")
