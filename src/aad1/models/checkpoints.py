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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aad1.errors import UserError
from aad1.models import wan_shapes
from aad1.models.dit import WanTransformer
from aad1.models.lora import Lora, merger
from aad1.models.recognise import PARTS, group_shards, kind_of, recognise, unrecognised
from aad1.models.tensor_files import (
    PICKLES,
    SAFETENSORS,
    Source,
    TensorFile,
    open_tensors,
    refuse_distributed,
)
from aad1.models.weights import build_transformer, index_files, read_json


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
        kind, source = recognise([open_tensors(path, weights)], path, _config(path.parent))
        if kind not in PARTS:
            raise UserError(unrecognised(path, kind, source))
        return _parts({kind: source}, None, (path,))
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    problems: list[str] = []
    others: list[str] = []
    looked: list[Path] = []
    found: dict[str, Source] = {}
    # Deeper folders count only for what the shallower ones do not have.
    for level in ([path, *_folders(path)], [f for p in _folders(path) for f in _folders(p)]):
        candidates: dict[str, list[Source]] = {n: [] for n in PARTS if n not in found}
        if not candidates:
            break
        looked += level
        for folder in level:
            refuse_distributed(folder)
            for kind, source in _sources(folder, weights, problems):
                if kind in candidates:
                    candidates[kind].append(source)
                elif folder == path and kind not in PARTS:
                    others.append(unrecognised(source.where, kind, source))
        for kind, sources in candidates.items():
            if len(sources) > 1:
                where = ", ".join(str(s.where) for s in sources)
                more = " (Wan 2.2's two are not supported)" if kind == "transformer" else ""
                raise UserError(
                    f"{path} holds {len(sources)} networks that are each a {PARTS[kind]}: {where}; "
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
    transformer, vae, text_encoder = (found.get(name) for name in PARTS)
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
            found.append(recognise([open_tensors(f) for f in files], folder, config))
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
        loose.setdefault(kind_of(opened.specs), []).append(opened)
    for kind, same in loose.items():
        for group in group_shards(same, problems) if kind in PARTS else [[f] for f in same]:
            where = folder if len(group) > 1 else group[0].path
            found.append(recognise(group, where, config))
    beside = tuple(problems[before:])
    return [(kind, replace(source, beside=beside)) for kind, source in found]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


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


def find_part(source: Source | str | Path, part: str) -> Source:
    """A source as it is, or that part of a path; UserError says what is there instead."""
    if isinstance(source, Source):
        return source
    parts = find_parts(source)
    if getattr(parts, part) is None and not parts.unread:
        there = [PARTS[name] for name in PARTS if getattr(parts, name) is not None]
        if there:
            raise UserError(f"{source} holds a {' and a '.join(there)}, not a {PARTS[part]}")
    return parts.source(part)


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
    source = find_part(source, "transformer")
    config = wan_shapes.wan_config(source)
    change = merger(loras, source) if loras else None
    return build_transformer(config, source, dtype, device, change)
