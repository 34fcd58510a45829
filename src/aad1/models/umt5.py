"""UMT5, the prompt encoder of Wan 2.1, behind the `TextEncoder` interface.

The encoder is larger than Wan's small transformer (5.7 billion weights), so it is loaded when the
first unknown prompt comes, `release` frees it, and prompts that were encoded stay known: in memory,
and on disk if a cache folder is given. transformers and ftfy are imported when they are needed.

Shape letters: B prompts, L rows per prompt, D width.
"""

from __future__ import annotations

import gc
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aad1.errors import UserError
from aad1.models.checkpoints import find_part, find_parts
from aad1.models.tensor_files import Source
from aad1.models.text import warn_once
from aad1.models.wan_shapes import umt5_json
from aad1.models.weights import (
    check_fit,
    load_module,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

CONFIG_FILE = "config.json"
CLASS_NAMES = ("Umt5Encoder", "UMT5EncoderModel")
KEPT_PROMPTS = 1024
WeightsChoice = Literal["copy", "reference", "none"]

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""What Wan 2.1 is guided away from, as published with it."""


def clean_prompt(prompt: str) -> str:
    """A prompt as Wan 2.1 reads it: mended encoding, HTML entities, single spaces.

    Entities are undone twice, since captions from the web are often escaped twice.
    """
    try:
        import ftfy
    except ImportError as error:
        raise UserError(
            f"Wan's prompts are cleaned with ftfy ({error}); install it: pip install 'aad1[wan]'"
        ) from None
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class Umt5Encoder:
    """Prompts -> rows of UMT5's last layer, zeros after a prompt's last token.

    tokenizer: transformers' tokenizer of the encoder.
    load: makes the encoder (transformers' `UMT5EncoderModel`) on its device, in its precision.
    dim: D. length: L, the tokens of a prompt that count (Wan: 512).
    identity: names the encoder's weights and precision; part of the key of a cached prompt.
    cache: folder for encoded prompts, or None.
    source: where the encoder was found, for `save_pretrained(weights="reference")`.

    A prompt's rows do not depend on the prompts beside it: each is encoded by itself, without
    padding, which the attention mask would hide anyway.
    """

    def __init__(
        self,
        tokenizer: Any,
        load: Callable[[], nn.Module],
        *,
        dim: int,
        identity: str,
        length: int = 512,
        device: torch.device | str = "cpu",
        cache: str | Path | None = None,
        source: Path | None = None,
    ) -> None:
        if length < 2:
            raise UserError(f"length must be at least 2 tokens, got {length}")
        self.tokenizer, self.identity, self.source = tokenizer, identity, source
        self.device = torch.device(device)
        self.cache = None if cache is None else Path(cache)
        self._dim, self._length = dim, length
        self._load = load
        self._model: nn.Module | None = None
        self._rows: dict[str, Tensor] = {}

    @classmethod
    def from_source(
        cls,
        source: Source,
        tokenizer: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        length: int = 512,
        cache: str | Path | None = None,
    ) -> Umt5Encoder:
        """An encoder from its tensors and its tokenizer's folder; the tensors are read later.

        UserError for tensors of another network, or no tokenizer.
        """
        device = torch.device(device)
        return cls(
            load_tokenizer(tokenizer),
            lambda: load_umt5(source, dtype, device),
            dim=umt5_json(source)["d_model"],
            identity=f"{source.fingerprint}/{dtype}" if cache else "",
            length=length,
            device=device,
            cache=cache,
            source=source.where,
        )

    @property
    def length(self) -> int:
        """L, rows per prompt."""
        return self._length

    @property
    def dim(self) -> int:
        """D, width of a row."""
        return self._dim

    @property
    def loaded(self) -> bool:
        """Whether the encoder's weights are in memory."""
        return self._model is not None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> float32 [B, L, D] on the encoder's device.

        Raises:
            TypeError: `prompts` is a string.
            UserError: the encoder's files are damaged, or were left out of a saved folder.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, got one string")
        out = torch.zeros(len(prompts), self.length, self.dim, device=self.device)
        for b, prompt in enumerate(prompts):
            rows = self._known(clean_prompt(prompt))
            out[b, : len(rows)] = rows.to(self.device, torch.float32)
        return out

    def release(self) -> None:
        """Free the encoder's memory; encoded prompts stay known, a new one loads it again."""
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _known(self, prompt: str) -> Tensor:
        """Rows [tokens, D] of a cleaned prompt: from memory, from disk, or computed now."""
        if prompt not in self._rows:
            path = self._cache_path(prompt)
            rows = None if path is None else _read_rows(path, self.dim)
            if rows is None:
                rows = self._encode(prompt).cpu()
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_tensors(path, {"rows": rows})
            if len(self._rows) >= KEPT_PROMPTS:
                self._rows.clear()
            self._rows[prompt] = rows
        return self._rows[prompt]

    def _encode(self, prompt: str) -> Tensor:
        tokens = self.tokenizer([prompt], add_special_tokens=True)["input_ids"][0]
        if len(tokens) > self.length:
            warn_once("tokens", f"a prompt has {len(tokens)} tokens; the first {self.length} count")
            cut = dict(truncation=True, max_length=self.length)
            tokens = self.tokenizer([prompt], add_special_tokens=True, **cut)["input_ids"][0]
        if self._model is None:
            self._model = self._load()
        ids = torch.tensor([tokens], device=self.device)
        return self._model(ids, torch.ones_like(ids)).last_hidden_state[0]  # type: ignore[no-any-return]

    def _cache_path(self, prompt: str) -> Path | None:
        if self.cache is None:
            return None
        key = json.dumps([self.identity, self.length, prompt])
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def save_pretrained(self, folder: str | Path, weights: WeightsChoice = "copy") -> None:
        """Write a folder that `from_pretrained` reads.

        weights: "copy" puts the encoder in (as safetensors, in its precision), "reference" notes
            where it lies on this machine, "none" leaves it out.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        encoder: str | None = None
        if weights == "copy":
            encoder, held = "text_encoder", self.loaded
            self._model = self._model or self._load()
            with _without_bars():
                self._model.save_pretrained(path / encoder)  # type: ignore[operator]
            if not held:
                self.release()
        elif weights == "reference":
            if self.source is None:
                raise UserError("the text encoder was not read from a folder: nothing to refer to")
            encoder = str(self.source.resolve())
        elif weights != "none":
            raise UserError(f"weights must be copy, reference or none, got {weights!r}")
        self.tokenizer.save_pretrained(path / "tokenizer")
        facts = {"length": self.length, "dim": self.dim, "encoder": encoder}
        write_json(path / CONFIG_FILE, {"_class_name": CLASS_NAMES[0], **facts})

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        cache: str | Path | None = None,
    ) -> Umt5Encoder:
        """Read what `save_pretrained` wrote, or find the encoder in a Wan folder of any layout.

        UserError names what is missing or damaged.
        """
        source, tokenizer, length = find_encoder(folder)
        return cls.from_source(
            source, tokenizer, device=device, dtype=dtype, length=length, cache=cache
        )


def find_encoder(folder: str | Path) -> tuple[Source, Path, int]:
    """The encoder's tensors, its tokenizer's folder, and the tokens of a prompt that count.

    folder: what `Umt5Encoder.save_pretrained` wrote, a pipeline's folder with that in `text/`, or
    Wan's weights in any layout. A note of where the encoder lies is followed.

    UserError names what is missing or damaged.
    """
    path = Path(folder)
    own = next((p for p in (path, path / "text") if _facts(p)), None)
    if own is None:
        parts = find_parts(path)
        parts.require("text_encoder", "tokenizer")
        assert parts.tokenizer is not None
        return parts.source("text_encoder"), parts.tokenizer, 512
    facts = _facts(own)
    length = int(facts.get("length", 512))
    if "base" in facts:  # noted by a training run: where its prompts were encoded
        return (*find_encoder(facts["base"])[:2], length)
    if facts.get("encoder") is None:
        raise UserError(
            f"{own} was saved without its text encoder; give a base folder that has one"
        )
    where = own / str(facts["encoder"])  # an absolute reference stays as it is
    if not where.exists():
        raise UserError(f"there is no text encoder at {where}")
    return find_part(where, "text_encoder"), own / "tokenizer", length


def _facts(folder: Path) -> dict[str, Any]:
    """config.json that `save_pretrained` or a training run wrote; {} if it is of others."""
    facts = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
    return facts if facts.get("_class_name") in CLASS_NAMES else {}


def load_tokenizer(folder: str | Path) -> Any:
    """transformers' tokenizer in `folder`; UserError if it is missing or damaged."""
    if not Path(folder).is_dir():
        raise UserError(f"there is no tokenizer folder {folder}")
    transformers = _transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # its loaders fail with almost any exception
        raise UserError(f"{folder} holds no tokenizer that can be read: {_line(error)}") from None


def load_umt5(source: Source, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """transformers' `UMT5EncoderModel` with these tensors, read file by file into place."""
    model = _empty(source).to(dtype)
    load_module(model, source, device)
    return model.eval().requires_grad_(False)


def check_umt5(source: Source) -> None:
    """UserError if tensors of the encoder are missing, unexpected or of other shapes. Needs
    transformers."""
    check_fit(_empty(source), source)


def _empty(source: Source) -> nn.Module:
    transformers = _transformers()
    with torch.device("meta"):
        config = transformers.UMT5Config(**umt5_json(source))
        return transformers.UMT5EncoderModel(config)  # type: ignore[no-any-return]


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers' progress bars off, for a while."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"Wan's text encoder needs transformers ({error}); install: pip install 'aad1[wan]'"
        ) from None
    return transformers


def _read_rows(path: Path, dim: int) -> Tensor | None:
    """Cached rows, or None if there are none that can be used."""
    if not path.is_file():
        return None
    try:
        rows = read_tensors(path).get("rows")
    except UserError:
        return None  # damaged: computed again and overwritten
    return rows if rows is not None and rows.dim() == 2 and rows.shape[1] == dim else None


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
