"""Stored text embeddings: what comes back, what is kept once, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from aad1.data.text_store import TextStore
from aad1.errors import UserError

PROMPTS = ["a cat", "", "Ein Hund läuft 快", "a/b\nc"]


class Encoder:
    """Random rows per prompt, zero after its last word."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        self.calls += prompts
        out = torch.zeros(len(prompts), 6, 4)
        for i, prompt in enumerate(prompts):
            n = len(prompt.split())
            out[i, :n] = torch.randn(n, 4, generator=torch.Generator().manual_seed(len(prompt)))
        return out


def create(folder: Path, **changes: object) -> TextStore:
    settings = dict(length=6, dim=4, negative="bad", encoder="e") | changes
    return TextStore.create(folder, **settings)  # type: ignore[arg-type]


def test_embeddings_come_back_padded_and_are_made_once(tmp_path: Path) -> None:
    encoder, store = Encoder(), create(tmp_path)
    assert store.add([*PROMPTS, "a cat"], encoder) == 4
    assert encoder.calls == PROMPTS
    assert store.add(reversed(PROMPTS), encoder) == 0
    assert encoder.calls == PROMPTS
    again = TextStore(tmp_path)
    assert (again.length, again.dim, again.negative) == (6, 4, "bad")
    rows = again(["a/b\nc", "", "a cat"])
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, Encoder()(["a/b\nc", "", "a cat"]).bfloat16())
    assert rows[1].count_nonzero() == 0
    assert again.path("a cat").stat().st_size < again.path("Ein Hund läuft 快").stat().st_size


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    store = create(tmp_path)
    store.add(["a cat"], Encoder())
    assert store.missing(["x", "a cat", "x"]) == ["x"]
    with pytest.raises(UserError, match="no embedding of the prompt 'x'"):
        store(["a cat", "x"])
    path = store.path("a cat")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="cut short"):
        store(["a cat"])
    with pytest.raises(UserError, match=r"no text embeddings: index\.json is missing"):
        TextStore(tmp_path / "nowhere")
    (tmp_path / "index.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="not an index of text embeddings"):
        TextStore(tmp_path)


@pytest.mark.parametrize(
    "change", [dict(length=7), dict(dim=8), dict(negative="worse"), dict(encoder="other")]
)
def test_a_folder_of_another_encoder_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    create(tmp_path)
    (name,) = change
    with pytest.raises(UserError, match=f"was begun with {name}"):
        create(tmp_path, **change)


def test_wrong_embeddings_are_not_stored(tmp_path: Path) -> None:
    store = create(tmp_path)
    with pytest.raises(ValueError, match=r"must be \[1, 6, 4\]"):
        store.add(["x"], lambda prompts: torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match="'x' is not finite"):
        store.add(["x"], lambda prompts: torch.full((1, 6, 4), float("nan")))
    assert "x" not in store


def test_copies_between_folders(tmp_path: Path) -> None:
    one, two = create(tmp_path / "one"), create(tmp_path / "two")
    one.add(PROMPTS, Encoder())
    two.copy_from(one, ["a cat", "unknown"])
    assert torch.equal(two(["a cat"]), one(["a cat"]))
    assert two.missing([*PROMPTS, "unknown"]) == [*PROMPTS[1:], "unknown"]
