"""The word encoder: words, padding, warnings, gradients, files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from aad1.errors import UserError
from aad1.models import text
from aad1.models.text import (
    TextEncoder,
    WordEncoder,
    WordEncoderConfig,
    split_words,
    vocabulary,
)

WORDS = ("turn", "left", "right", "while", "walking")


@pytest.fixture
def encoder() -> WordEncoder:
    return WordEncoder(WordEncoderConfig(words=WORDS, length=4, dim=6))


@pytest.fixture(autouse=True)
def _no_warning_given_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_warned", set())


def test_a_row_is_its_word_plus_its_position(encoder: WordEncoder) -> None:
    context = encoder(["turn left", "left"])
    assert context.shape == (2, 4, 6)
    words, positions = encoder.words.weight, encoder.positions
    torch.testing.assert_close(context[0, 0], words[0] + positions[0])
    torch.testing.assert_close(context[0, 1], words[1] + positions[1])
    torch.testing.assert_close(context[1, 0], words[1] + positions[0])


def test_padding_and_the_null_prompt_are_exactly_zero(encoder: WordEncoder) -> None:
    context = encoder(["turn left", "", " ?! "])
    assert context[0, 2:].eq(0).all()
    assert context[1:].eq(0).all()
    assert context[0, :2].ne(0).any(dim=-1).all()


def test_padding_stays_zero_beside_a_weight_that_is_not_finite(encoder: WordEncoder) -> None:
    with torch.no_grad():
        encoder.words.weight[0] = float("inf")
    assert encoder([""]).eq(0).all()


def test_case_and_punctuation_do_not_count(encoder: WordEncoder) -> None:
    same = encoder(["turn left", "Turn, LEFT!", "turn-left", "  turn\n left. "])
    for other in same[1:]:
        torch.testing.assert_close(other, same[0], rtol=0, atol=0)
    assert split_words("Don't turn_left; go 2 méters") == [
        "dont",
        "turn",
        "left",
        "go",
        "2",
        "méters",
    ]


def test_no_prompts_give_no_rows(encoder: WordEncoder) -> None:
    assert encoder([]).shape == (0, 4, 6)


def test_one_warning_lists_the_words_known(encoder: WordEncoder) -> None:
    with pytest.warns(UserWarning, match="left out of the prompt: fly") as caught:
        context = encoder(["fly left", "dance right", "fly up"])
    assert len(caught) == 1
    message = str(caught[0].message)
    for word in WORDS:
        assert word in message
    torch.testing.assert_close(context[0], encoder(["left"])[0])
    assert context[2].eq(0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["swim", "left"])
        WordEncoder(encoder.config)(["jump"])


def test_long_prompts_are_cut_with_one_warning(encoder: WordEncoder) -> None:
    with pytest.warns(UserWarning, match="5 known words; the first 4 count") as caught:
        context = encoder(["turn left while walking right", "right right right right left"])
    assert len(caught) == 1
    torch.testing.assert_close(context[0], encoder(["turn left while walking"])[0])


def test_very_long_prompt(encoder: WordEncoder) -> None:
    with pytest.warns(UserWarning, match="first 4 count"):
        assert encoder(["left " * 100_000]).isfinite().all()


@pytest.mark.parametrize("prompts", ["turn left", [None], [["turn"]]])
def test_only_lists_of_strings(encoder: WordEncoder, prompts: object) -> None:
    with pytest.raises(TypeError, match="string"):
        encoder(prompts)


def test_gradients_reach_the_words_in_use_alone(encoder: WordEncoder) -> None:
    encoder(["turn left", ""]).square().sum().backward()
    grad = encoder.words.weight.grad
    assert grad is not None
    assert grad[:2].ne(0).any(dim=-1).all()
    assert grad[2:].eq(0).all()
    assert encoder.positions.grad is not None
    assert encoder.positions.grad[:2].ne(0).any(dim=-1).all()
    assert encoder.positions.grad[2:].eq(0).all()


def test_tokens_are_cached_and_the_cache_is_bounded(
    encoder: WordEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_CACHED_PROMPTS", 3)
    first = encoder(["turn left"])
    monkeypatch.setattr(text, "split_words", lambda prompt: ["right"])
    torch.testing.assert_close(encoder(["turn left"]), first)
    encoder([str(k) for k in range(10)])
    assert len(encoder._cache) <= 3


def test_vocabulary_is_sorted_and_without_repeats() -> None:
    assert vocabulary(["Turn left.", "left, then right"]) == ("left", "right", "then", "turn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": ()}, "at least one word"),
        ({"words": ("left", "left")}, "'left' is named twice"),
        ({"words": ("Left",)}, "'Left' must be"),
        ({"words": ("turn left",)}, "'turn left' must be"),
        ({"length": 0}, "length=0 must be >= 1"),
        ({"dim": -1}, "dim=-1 must be >= 1"),
    ],
)
def test_impossible_configs(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        WordEncoderConfig(**{"words": WORDS, **change})  # type: ignore[arg-type]


def test_save_and_load(encoder: WordEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "text")
    assert sorted(p.name for p in (tmp_path / "text").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded: TextEncoder = WordEncoder.from_pretrained(tmp_path / "text")
    assert (loaded.length, loaded.dim) == (4, 6)
    prompts = ["turn left", ""]
    torch.testing.assert_close(loaded(prompts), encoder(prompts), rtol=0, atol=0)
    half = WordEncoder.from_pretrained(tmp_path / "text", dtype=torch.bfloat16)
    assert half(prompts).dtype == torch.bfloat16


def damage_config(folder: Path, change: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "Other"}, "WordEncoder"),
        ({"colour": 1}, "must have the fields dim, length, words"),
        ({"dim": "6"}, "dim='6' must be a whole number"),
        ({"words": "turn"}, "list of strings"),
        ({"dim": 7}, "expected .*7"),
    ],
)
def test_damaged_configs(
    encoder: WordEncoder, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    encoder.save_pretrained(tmp_path)
    damage_config(tmp_path, change)
    with pytest.raises(UserError, match=message):
        WordEncoder.from_pretrained(tmp_path)


def test_truncated_weights(encoder: WordEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
        WordEncoder.from_pretrained(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        WordEncoder.from_pretrained(tmp_path / "nowhere")
