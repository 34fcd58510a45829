"""Prompts to conditioning: the interface, and a small trainable encoder for the small worlds.

Shape letters: B prompts, L rows per prompt, D width.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from aad1.core.transfer import upload
from aad1.errors import UserError
from aad1.models.weights import load_strict, read_json, read_tensors, write_json, write_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_CACHED_PROMPTS = 8192
_warned: set[str] = set()  # kinds of warning that this process has given


class TextEncoder(Protocol):
    """What the rest asks of a prompt encoder, small or UMT5.

    Rows after a prompt's last token are exactly zero, as Wan 2.1 pads, and "" is the null prompt
    that guidance and dropped captions use.
    """

    @property
    def length(self) -> int:
        """L."""
        ...

    @property
    def dim(self) -> int:
        """D."""
        ...

    def __call__(self, prompts: Sequence[str], /) -> Tensor:
        """B prompts -> float [B, L, D]."""
        ...

    def save_pretrained(self, folder: str | Path, /) -> None:
        """Write what a pipeline needs to find or make the encoder again."""
        ...


@dataclass(frozen=True, kw_only=True)
class WordEncoderConfig:
    """The geometry of a `WordEncoder`."""

    words: tuple[str, ...]
    """The vocabulary, in the order of the embedding's rows."""
    length: int = 16
    """Most words of a prompt that count; also the number of rows that come out."""
    dim: int = 64
    """Width of a row."""

    def __post_init__(self) -> None:
        if not self.words:
            raise UserError("words must name at least one word")
        for word in self.words:
            if split_words(word) != [word]:
                raise UserError(f"words: {word!r} must be one lower-case word of letters or digits")
        if len(set(self.words)) < len(self.words):
            double = next(w for w in self.words if self.words.count(w) > 1)
            raise UserError(f"words: {double!r} is named twice")
        for name in ("length", "dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be >= 1")


def split_words(prompt: str) -> list[str]:
    """Lower-case words without punctuation: "Don't turn-left!" -> dont, turn, left."""
    return re.findall(r"[^\W_]+", re.sub("['’]", "", prompt.lower()))


def vocabulary(captions: Iterable[str]) -> tuple[str, ...]:
    """Every word of the captions once, sorted: the `words` of an encoder for them."""
    return tuple(sorted({word for caption in captions for word in split_words(caption)}))


class WordEncoder(nn.Module):
    """A learned vector per word plus one per position; trained along with the denoiser.

    Unknown words are left out, and words beyond `length` are cut off, with one warning of each
    kind per process. The prompt "" and one of unknown words alone give zeros throughout.
    """

    def __init__(self, config: WordEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(len(config.words), config.dim)
        self.positions = nn.Parameter(0.1 * torch.randn(config.length, config.dim))
        self._row = {word: row for row, word in enumerate(config.words)}
        self._cache: dict[str, list[int]] = {}

    @property
    def length(self) -> int:
        """L, rows per prompt."""
        return self.config.length

    @property
    def dim(self) -> int:
        """D, width of a row."""
        return self.config.dim

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> float [B, L, D]; rows after a prompt's last known word are exactly zero.

        Raises:
            TypeError: `prompts` is a string or holds something else than strings.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, got one string")
        rows = [self._rows(prompt) for prompt in prompts]
        ids_BL = torch.tensor(rows, dtype=torch.long).view(len(rows), self.length)
        ids_BL = upload(ids_BL, self.positions.device)
        known_BL1 = (ids_BL >= 0).unsqueeze(-1)
        context_BLD = self.words(ids_BL.clamp(min=0)) + self.positions
        # where, unlike a product, keeps padding at zero even beside a weight that is not finite
        return torch.where(known_BL1, context_BLD, torch.zeros_like(context_BLD))

    def _rows(self, prompt: str) -> list[int]:
        """Embedding rows of a prompt, -1 for padding; cached, as training repeats few captions."""
        if not isinstance(prompt, str):
            raise TypeError(f"a prompt must be a string, got {type(prompt).__name__}")
        rows = self._cache.get(prompt)
        if rows is None:
            rows = self._tokenise(prompt)
            if len(self._cache) >= _CACHED_PROMPTS:
                self._cache.clear()
            self._cache[prompt] = rows
        return rows

    def _tokenise(self, prompt: str) -> list[int]:
        words = split_words(prompt)
        known = [word for word in words if word in self._row]
        unknown = [word for word in words if word not in self._row]
        if unknown:
            warn_once(
                "unknown",
                f"left out of the prompt: {', '.join(dict.fromkeys(unknown))}. "
                f"The words known here: {', '.join(sorted(self._row))}",
            )
        if len(known) > self.length:
            warn_once(
                "long", f"a prompt has {len(known)} known words; the first {self.length} count"
            )
        rows = [self._row[word] for word in known[: self.length]]
        return rows + [-1] * (self.length - len(rows))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors (in `dtype` if given) into `folder`."""
        path = Path(folder)
        write_tensors(path / WEIGHTS_FILE, self.state_dict(), dtype)
        write_json(path / CONFIG_FILE, {"_class_name": "WordEncoder", **asdict(self.config)})

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> WordEncoder:
        """Read what `save_pretrained` wrote.

        Raises:
            UserError: a missing or damaged file, another class, a field or key that does not fit.
        """
        path = Path(folder)
        raw = read_json(path / CONFIG_FILE)
        if raw.pop("_class_name", None) != "WordEncoder":
            raise UserError(f'{path / CONFIG_FILE} must name "_class_name": "WordEncoder"')
        known = {field.name for field in fields(WordEncoderConfig)}
        if raw.keys() != known:
            raise UserError(
                f"{path / CONFIG_FILE} must have the fields {', '.join(sorted(known))}, "
                f"got {', '.join(sorted(raw))}"
            )
        words = raw.pop("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{path / CONFIG_FILE}: words must be a list of strings")
        for name, value in raw.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserError(f"{path / CONFIG_FILE}: {name}={value!r} must be a whole number")
        encoder = cls(WordEncoderConfig(words=tuple(words), **raw))
        load_strict(encoder, read_tensors(path / WEIGHTS_FILE), str(path / WEIGHTS_FILE))
        return encoder.to(device=device, dtype=dtype).eval()


def warn_once(kind: str, message: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(message, stacklevel=2)
