"""Weights read by rows, from both kinds of files; what is damaged is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from aad1.errors import UserError
from aad1.models.tensor_files import Source, open_tensors
from aad1.parallel.load import fill


def source(path: Path, tensors: dict[str, torch.Tensor]) -> Source:
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return Source(path, {name: (open_tensors(path), name) for name in tensors})


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_only_the_rows_that_are_asked_for_are_read(name: str, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).view(6, 2), "b": torch.arange(3.0), "c": torch.ones(2)}
    file = source(tmp_path / name, tensors)
    read = dict(file.read(rows={"a": slice(2, 5), "b": slice(3, 3)}))
    assert torch.equal(read["a"], tensors["a"][2:5])
    assert "b" not in read  # none of its rows
    assert torch.equal(read["c"], tensors["c"])
    assert {n: t.shape for n, t in file.read()} == {n: t.shape for n, t in tensors.items()}


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    layer = nn.Linear(2, 3)
    weights = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    fill(layer, source(tmp_path / "good.safetensors", weights))
    assert torch.equal(layer.weight, weights["weight"])
    weights["weight"][2, 1] = float("nan")
    with pytest.raises(UserError, match=r"bad.safetensors: weight has numbers that are not finite"):
        fill(layer, source(tmp_path / "bad.safetensors", weights))
