"""UMT5 as Wan uses it: cleaning, caching, releasing, folders. Parity of its rows with WanPipeline's
is in test_wan_pipeline.py."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from aad1.errors import UserError
from aad1.models import umt5
from aad1.models.umt5 import Umt5Encoder, clean_prompt

pytest.importorskip("transformers")


@pytest.fixture
def folder(wan_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny encoder and its tokenizer that a test may spoil."""
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(wan_folder / part, tmp_path / "wan" / part)
    return tmp_path / "wan"


def load(folder: Path, cache: Path | None = None) -> Umt5Encoder:
    return Umt5Encoder.from_pretrained(folder, dtype=torch.float32, cache=cache)


@pytest.mark.parametrize(
    "prompt",
    ["plain", " a \n b\t\tc ", "x &lt; y", "x &amp;lt; y", "x &amp;amp;lt; y", "schÃ¶n", "“quoted”",
     "", "\x00 \u200b e\u0301", "ﬁne １２", "a\u00a0b"],
)  # fmt: skip
def test_prompts_are_cleaned_as_diffusers_cleans_them(prompt: str) -> None:
    wan = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    assert clean_prompt(prompt) == wan.prompt_clean(prompt)


def test_entities_are_undone_twice_and_space_is_single() -> None:
    assert clean_prompt("  a &amp;lt;\n b ") == "a < b"
    assert clean_prompt("cafÃ©") == "café"


def test_the_encoder_is_loaded_when_needed_and_released(folder: Path) -> None:
    encoder = load(folder)
    assert not encoder.loaded
    first = encoder(["a cat"])
    assert first.dtype == torch.float32 and first.shape == (1, 512, 16)
    assert encoder.loaded
    encoder.release()
    assert not encoder.loaded
    assert torch.equal(encoder(["a  cat"]), first)  # known, cleaned: not loaded for it
    assert not encoder.loaded
    assert not torch.equal(encoder(["a dog"]), first)
    assert encoder.loaded


def test_release_frees_the_weights(folder: Path) -> None:
    import gc
    import weakref

    encoder = load(folder)
    encoder(["a"])
    weights = weakref.ref(encoder._model)  # type: ignore[arg-type]
    encoder.release()
    gc.collect()
    assert weights() is None


def test_prompts_are_kept_on_disk(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    want = load(folder, cache)(["a cat", "two dogs"])
    assert len(list(cache.iterdir())) == 2
    again = load(folder, cache)
    assert torch.equal(again(["two dogs", "a cat"]), want.flip(0))
    assert not again.loaded
    # A damaged file is computed anew.
    damaged = sorted(cache.iterdir())[0]
    damaged.write_bytes(b"x" * 50)
    assert torch.equal(load(folder, cache)(["a cat", "two dogs"]), want)
    assert damaged.stat().st_size > 50


def test_another_encoder_has_other_entries(folder: Path, tmp_path: Path) -> None:
    """Rows of other weights or another precision must not be taken for these."""
    from safetensors.torch import load_file, save_file

    cache = tmp_path / "cache"
    first = load(folder, cache)(["a cat"])
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file({k: v * 1.5 for k, v in state.items()}, path, metadata={"format": "pt"})
    changed = load(folder, cache)
    assert not torch.allclose(changed(["a cat"]), first)
    assert changed.loaded
    half = Umt5Encoder.from_pretrained(folder, dtype=torch.bfloat16, cache=cache)
    half(["a cat"])
    assert half.loaded
    assert len(list(cache.iterdir())) == 3


def test_bf16_is_near_fp32(folder: Path) -> None:
    want = load(folder)(["two red dogs walk"])
    got = Umt5Encoder.from_pretrained(folder)(["two red dogs walk"])
    assert got.dtype == torch.float32
    assert 0 < float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("weights", ["copy", "reference"])
def test_a_saved_encoder_gives_the_same_rows(folder: Path, tmp_path: Path, weights: str) -> None:
    encoder = load(folder)
    encoder.save_pretrained(tmp_path / "text", weights)  # type: ignore[arg-type]
    assert not encoder.loaded
    again = load(tmp_path / "text")
    assert torch.equal(again(["a cat"]), encoder(["a cat"]))
    copied = (tmp_path / "text" / "text_encoder" / "model.safetensors").exists()
    assert copied == (weights == "copy")
    assert not list((tmp_path / "text").rglob("*.bin"))


def test_an_encoder_that_was_left_out_is_asked_for(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "text", "none")
    with pytest.raises(UserError, match="without its text encoder; give a base folder"):
        load(tmp_path / "text")
    load(folder).save_pretrained(tmp_path / "gone", "reference")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no text encoder at .*wan/text_encoder"):
        load(tmp_path / "gone")


def test_a_note_of_the_base_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    """As a training run on Wan's data saves it."""
    (tmp_path / "text").mkdir()
    note = {"_class_name": "UMT5EncoderModel", "base": str(folder), "length": 64, "dim": 16}
    (tmp_path / "text" / "config.json").write_text(json.dumps(note))
    got = load(tmp_path / "text")(["a cat"])
    assert torch.equal(got, load(folder)(["a cat"])[:, :64])


def spoil(folder: Path, what: str) -> None:
    encoder = folder / "text_encoder"
    weights = encoder / "model.safetensors"
    if what == "no weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "no shard":
        index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
        (encoder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "missing keys":
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        del state["encoder.final_layer_norm.weight"]
        save_file(state, weights, metadata={"format": "pt"})
    elif what == "no tokenizer":
        shutil.rmtree(folder / "tokenizer")
    elif what == "empty tokenizer":
        for file in (folder / "tokenizer").iterdir():
            file.unlink()


@pytest.mark.parametrize(
    "what,message",
    [
        ("no weights", "no text_encoder found; looked in"),
        ("truncated", "model.safetensors is truncated"),
        ("no shard", "model-2.safetensors does not exist"),
        ("missing keys", r"does not fit the model: 1 missing .encoder.final_layer_norm.weight"),
        ("no tokenizer", "no tokenizer found; looked in"),
        ("empty tokenizer", "no tokenizer found; looked in"),
    ],
)
def test_damaged_folders_are_told_in_one_line(folder: Path, what: str, message: str) -> None:
    spoil(folder, what)
    with pytest.raises(UserError, match=message) as error:
        load(folder)(["a"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["transformers", "ftfy"])
def test_missing_packages_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}.*pip install 'aad1\[wan\]'"):
        load(folder)(["a"])


def test_misuse_is_refused(folder: Path) -> None:
    encoder = load(folder)
    with pytest.raises(TypeError, match="list of strings"):
        encoder("a cat")
    with pytest.raises(UserError, match="copy, reference or none, got 'all'"):
        encoder.save_pretrained(folder / "x", "all")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="length must be at least 2 tokens, got 1"):
        Umt5Encoder(None, lambda: torch.nn.Identity(), dim=1, identity="", length=1)


def test_memory_of_prompts_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(umt5, "KEPT_PROMPTS", 3)
    encoder = load(folder)
    for n in range(8):
        encoder([f"a {'cat ' * n}"])
    assert len(encoder._rows) <= 3
