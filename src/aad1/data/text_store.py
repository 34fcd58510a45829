"""Text embeddings on disk: each distinct prompt encoded once, found again by its words.

    folder/
        index.json                   {"format", "length", "dim", "negative", "encoder"}
        prompts/<hash>.safetensors   rows [n, D], the prompt itself in the header

Wan's encoder gives 512 rows per prompt, of which all after the last token are zero; only the n
rows before those are kept, in bfloat16 (the precision that Wan's encoder itself computes in).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from aad1.atomic import replace_file
from aad1.errors import UserError

FORMAT = "aad1.text.1"
INDEX = "index.json"
_BATCH = 8

Encode = Callable[[Sequence[str]], torch.Tensor]
"""Prompts -> rows [n, length, dim], zero after a prompt's last token."""


class TextStore:
    """The embeddings of one folder.

    length, dim: shape of a padded prompt. negative: the prompt that guidance steers away from; its
    embedding is in the folder like any other's.
    """

    def __init__(self, folder: Path | str) -> None:
        """Open a folder that `create` made; UserError if it is none."""
        self.folder = Path(folder)
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"its format is {index['format']!r}, not {FORMAT!r}")
            self.length, self.dim = int(index["length"]), int(index["dim"])
            self.negative, self.encoder = str(index["negative"]), str(index["encoder"])
        except FileNotFoundError:
            raise UserError(f"{self.folder} holds no text embeddings: {INDEX} is missing") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not an index of text embeddings: {error}") from None

    @classmethod
    def create(
        cls, folder: Path | str, *, length: int, dim: int, negative: str, encoder: str = ""
    ) -> TextStore:
        """Open `folder`, or begin it; encoder: what tells one encoder's weights from another's.

        UserError if it was begun with another encoder, size or negative prompt.
        """
        folder = Path(folder)
        wanted = {"length": length, "dim": dim, "negative": negative, "encoder": encoder}
        if not (folder / INDEX).exists():
            with replace_file(folder / INDEX) as temporary:
                temporary.write_text(
                    json.dumps({"format": FORMAT, **wanted}, ensure_ascii=False) + "\n",
                    encoding="utf-8",
                )
        store = cls(folder)
        for name, value in wanted.items():
            if getattr(store, name) != value:
                raise UserError(
                    f"{folder} was begun with {name} {getattr(store, name)!r}, now it is "
                    f"{value!r}: remove it or write to another folder"
                )
        return store

    def path(self, prompt: str) -> Path:
        """The file of a prompt's embedding, there or not."""
        name = hashlib.sha256(prompt.encode()).hexdigest()[:32]
        return self.folder / "prompts" / f"{name}.safetensors"

    def __contains__(self, prompt: str) -> bool:
        return self.path(prompt).exists()

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The distinct prompts without an embedding, in order."""
        return [p for p in dict.fromkeys(prompts) if p not in self]

    def add(self, prompts: Iterable[str], encode: Encode) -> int:
        """Encode and store the prompts that are not there yet; returns how many those were.

        Raises ValueError for embeddings of another shape, or with a number that is not finite.
        """
        from safetensors.torch import save_file

        new = self.missing(prompts)
        for start in range(0, len(new), _BATCH):
            part = new[start : start + _BATCH]
            with torch.no_grad():
                rows = encode(part).detach().cpu()
            if rows.shape != (len(part), self.length, self.dim):
                raise ValueError(
                    f"embeddings must be [{len(part)}, {self.length}, {self.dim}], "
                    f"got {list(rows.shape)}"
                )
            for prompt, padded in zip(part, rows.to(torch.bfloat16), strict=True):
                if not bool(torch.isfinite(padded).all()):
                    raise ValueError(f"the embedding of {prompt!r} is not finite")
                used = padded.any(dim=1).nonzero()
                kept = padded[: int(used[-1]) + 1 if len(used) else 0].contiguous()
                with replace_file(self.path(prompt)) as temporary:
                    save_file({"rows": kept}, temporary, metadata={"prompt": prompt})
        return len(new)

    def copy_from(self, other: TextStore, prompts: Iterable[str]) -> None:
        """Take the embeddings of these prompts over from another folder, as far as it has them."""
        for prompt in self.missing(prompts):
            if prompt in other:
                with replace_file(self.path(prompt)) as temporary:
                    shutil.copyfile(other.path(prompt), temporary)

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts -> bfloat16 [n, length, dim]; UserError names a prompt that is not stored."""
        out = torch.zeros(len(prompts), self.length, self.dim, dtype=torch.bfloat16)
        for i, prompt in enumerate(prompts):
            rows = self.rows(prompt)
            out[i, : len(rows)] = rows
        return out

    def rows(self, prompt: str) -> torch.Tensor:
        """bfloat16 [n, dim], without padding; UserError if the prompt is not stored."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path(prompt)
        try:
            return load_file(path)["rows"]
        except FileNotFoundError:
            raise UserError(f"{self.folder} has no embedding of the prompt {prompt!r}") from None
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path} is cut short or no embedding: {error}") from None
