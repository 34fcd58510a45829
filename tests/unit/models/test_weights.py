"""Weight folders: strict keys, sharded files, and one line for everything that is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aad1.errors import UserError
from aad1.models.dit import WanConfig, WanTransformer
from aad1.models.weights import WEIGHTS, load_strict, read_json, read_tensors, write_tensors

TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=1, text_dim=8,
    freq_dim=16, in_channels=4, out_channels=4,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    WanTransformer(TINY).save_pretrained(tmp_path)
    return tmp_path


def test_round_trip_keeps_config_and_values(tmp_path: Path) -> None:
    config = replace(TINY, patch_size=(1, 1, 2), rope_theta=100.0, prediction="x0")
    model = WanTransformer(config)
    model.save_pretrained(tmp_path)
    again = WanTransformer.from_pretrained(tmp_path)
    assert again.config == config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_fields_unknown_to_diffusers_are_written_only_if_they_differ(folder: Path) -> None:
    raw = read_json(folder / "config.json")
    assert "prediction" not in raw and "rope_theta" not in raw
    assert raw["_class_name"] == "WanTransformer3DModel"


def test_dtype_of_file_and_of_loading(tmp_path: Path) -> None:
    model = WanTransformer(TINY)
    model.save_pretrained(tmp_path, torch.bfloat16)
    assert load_file(tmp_path / WEIGHTS)["proj_out.weight"].dtype == torch.bfloat16
    assert WanTransformer.from_pretrained(tmp_path).dtype == torch.float32
    assert WanTransformer.from_pretrained(tmp_path, torch.bfloat16).dtype == torch.bfloat16


def test_numbers_that_a_narrower_dtype_cannot_hold_are_told(tmp_path: Path) -> None:
    """As `aad1 export` writes float16: infinity in the file would show only when it is loaded."""
    model = WanTransformer(TINY)
    with torch.no_grad():
        model.proj_out.bias[0] = 1e5
    with pytest.raises(UserError, match=r"proj_out\.bias has numbers that torch\.float16 cannot"):
        model.save_pretrained(tmp_path / "half", torch.float16)
    assert not list((tmp_path / "half").glob("*.safetensors"))
    model.save_pretrained(tmp_path, torch.bfloat16)
    with torch.no_grad():
        bias = WanTransformer.from_pretrained(tmp_path).proj_out.bias
        assert float(bias[0]) == pytest.approx(1e5, 0.01)


def test_sharded_files_are_joined(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    half = len(names) // 2
    parts = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / file)
    weight_map = {k: file for file, keys in parts.items() for k in keys}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / WEIGHTS).unlink()
    again = WanTransformer.from_pretrained(folder)
    assert torch.equal(again.proj_out.weight, tensors["proj_out.weight"])
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match="b.safetensors does not exist"):
        WanTransformer.from_pretrained(folder)
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        WanTransformer.from_pretrained(folder)


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX systems")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_get_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(num_layers="two"), "num_layers must be like 30, got 'two'"),
        (dict(num_layers=True), "num_layers must be like 30, got True"),
        (dict(num_layers=0), "num_layers must be at least 1, got 0"),
        (dict(patch_size=[1, 2]), r"patch_size must be \(1, h, w\), got \(1, 2\)"),
        (dict(patch_size=2), "patch_size must be like"),
        (dict(eps=None), "eps must be like 1e-06, got None"),
        (dict(image_dim=1280), "image branch"),
        (dict(prediction="noise"), "prediction must be"),
    ],
)
def test_a_bad_config_is_told_in_one_line(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    raw = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(UserError, match=message) as error:
        WanTransformer.from_pretrained(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_config_of_another_size_names_a_shape(folder: Path) -> None:
    raw = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(raw | dict(ffn_dim=48)))
    with pytest.raises(UserError, match=r"ffn.net.0.proj.bias is \[32\], expected \[48\]"):
        WanTransformer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_broken_json_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="config.json") as error:
        WanTransformer.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:4], lambda b: b"\0" * len(b)])
def test_damaged_tensors_are_named(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="truncated or not a safetensors file") as error:
        read_tensors(path)
    assert "\n" not in str(error.value)


def test_all_problems_of_a_state_are_listed_and_nothing_is_loaded() -> None:
    layer = torch.nn.Linear(2, 3)
    before = layer.weight.clone()
    with pytest.raises(UserError) as error:
        load_strict(layer, {"weight": torch.zeros(3, 3), "scale": torch.zeros(1)}, "x.safetensors")
    text = str(error.value)
    assert "x.safetensors" in text
    assert "1 missing (bias)" in text
    assert "1 unexpected (scale)" in text
    assert "weight is [3, 3], expected [3, 2]" in text
    with pytest.raises(UserError):
        load_strict(layer, {"weight": torch.zeros(3, 2)}, "x")
    assert torch.equal(layer.weight, before)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": torch.ones(2)})
    with pytest.raises(AttributeError):
        write_tensors(path, {"a": "no tensor"})  # type: ignore[dict-item]
    assert torch.equal(read_tensors(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
