"""Lazily read files, modules filled from them on the meta device, and shards written from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from aad1.errors import UserError
from aad1.models.tensor_files import Source, open_tensors
from aad1.models.weights import InMemory, load_module, write_shards

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def source(path: Path) -> Source:
    file = open_tensors(path)
    return Source(path, {name: (file, name) for name in file.specs})


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_names_shapes_and_types_are_known_before_reading(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    save_file(STATE, path) if suffix == ".safetensors" else torch.save(STATE, path)
    opened = source(path)
    assert {n: (s.shape, s.dtype, s.bytes) for n, s in opened.specs.items()} == {
        "a": ((2, 3), torch.float32, 24),
        "b": ((4,), torch.bfloat16, 8),
    }
    assert [n for n, _ in opened.read(["b"])] == ["b"]
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in opened.read())


def test_a_pt_is_searched_for_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    other = {"a": torch.zeros(1)}
    torch.save({"critic": other, "ema": STATE, "step": 3, "log": {"lr": 0.1}}, path)
    assert open_tensors(path).weights == "ema"
    torch.save({"net": STATE, "step": 3}, path)
    assert open_tensors(path).specs["a"].shape == (2, 3)
    torch.save({"net": STATE, "other": other}, path)
    with pytest.raises(UserError, match="holds net, other: say which one is meant"):
        open_tensors(path)
    assert open_tensors(path, "other").specs["a"].shape == (1,)
    torch.save({"model": {"inner": STATE}}, path)
    assert set(open_tensors(path).specs) == {"inner.a", "inner.b"}
    for empty in ({}, {"step": 3}, {"model": {}}):
        torch.save(empty, path)
        with pytest.raises(UserError, match="holds no tensors"):
            open_tensors(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no.pt does not exist"):
        open_tensors(tmp_path / "no.pt")
    for name, words in (("x.gguf", "GGUF files are not supported"), ("x.onnx", "that can be read")):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=words):
            open_tensors(tmp_path / name)


class Tied(nn.Module):
    """Two names for one parameter, a buffer, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(5, 3)
        self.inner = nn.ModuleDict({"embed": self.shared, "linear": nn.Linear(3, 2)})
        self.register_buffer("count", torch.zeros(1))
        self.inner["linear"].bias.requires_grad_(False)


def test_a_module_is_filled_in_its_own_dtypes_and_stays_tied(tmp_path: Path) -> None:
    state = {
        "shared.weight": torch.randn(5, 3),
        "inner.linear.weight": torch.randn(2, 3, dtype=torch.float64),
        "inner.linear.bias": torch.randn(2),
        "count": torch.ones(1),
    }
    save_file(state, tmp_path / "x.safetensors")
    with torch.device("meta"):
        module = Tied()
    module.shared.to(torch.bfloat16)
    seen = []

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return tensor + 1

    load_module(module, source(tmp_path / "x.safetensors"), change=change)
    assert module.inner["embed"].weight is module.shared.weight
    assert torch.equal(module.shared.weight, (state["shared.weight"] + 1).bfloat16())
    assert module.inner["linear"].weight.dtype == torch.float32
    assert module.inner["linear"].weight.requires_grad
    assert not module.inner["linear"].bias.requires_grad
    assert torch.equal(module.count, torch.full((1,), 2.0))
    assert sorted(seen) == sorted(state)


def test_nothing_is_read_if_names_do_not_fit(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 3), "x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"1 missing \(bias\); 1 unexpected \(x\)"):
        load_module(module, source(tmp_path / "x.safetensors"))
    assert module.weight.is_meta


def test_shards_and_index_are_as_the_hub_has_them(tmp_path: Path) -> None:
    state = {f"k{i}": torch.full((10,), float(i)) for i in range(5)}  # 40 bytes each
    write_shards(tmp_path, "model", InMemory(state), limit=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = [f"model-{i:05}-of-00003.safetensors" for i in (1, 1, 2, 2, 3)]
    assert index == {
        "metadata": {"total_size": 200},
        "weight_map": dict(zip(state, files, strict=True)),
    }
    read = {n: t for f in set(files) for n, t in load_file(tmp_path / f).items()}
    assert all(torch.equal(read[name], state[name]) for name in state)
    write_shards(tmp_path, "model", InMemory(state, torch.bfloat16), limit=100)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert load_file(tmp_path / "model.safetensors")["k3"].dtype == torch.bfloat16
