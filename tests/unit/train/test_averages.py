"""Moving averages: applied and taken back, and kept on the CPU with the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aad1.train import averages
from aad1.train.averages import Averages


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("at_once", [2**26, 1])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_it_has_its_closed_form_however_it_is_split(
    at_once: int, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(averages, "AT_ONCE", at_once)
    if on_cpu:  # as if the weights were elsewhere: what is brought to them is a copy
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self.clone())
    net = network()
    mean = Averages({"generator": net}, 0.8, on_cpu=on_cpu)
    want = {n: p.detach().double() for n, p in net.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        mean.update()
        want = {n: 0.8 * want[n] + 0.2 * p.detach().double() for n, p in net.named_parameters()}
    monkeypatch.undo()
    for name, value in mean.tensors["generator"].items():
        torch.testing.assert_close(value.double(), want[name], atol=1e-6, rtol=1e-5)


def test_within_applied_the_network_has_the_averages_and_after_it_its_own() -> None:
    net = network()
    mean = Averages({"generator": net}, 0.5)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    mean.update()
    own = {n: p.detach().clone() for n, p in net.named_parameters()}
    kept = {n: p.clone() for n, p in mean.tensors["generator"].items()}
    pointers = [p.data_ptr() for p in net.parameters()]
    with pytest.raises(KeyError), mean.applied():
        for name, p in net.named_parameters():
            assert torch.equal(p, kept[name]) and not torch.equal(p, own[name])
        raise KeyError("whatever happens")
    for name, p in net.named_parameters():
        assert torch.equal(p, own[name])
        assert torch.equal(mean.tensors["generator"][name], kept[name])
    assert [p.data_ptr() for p in net.parameters()] == pointers


def test_the_device_is_waited_for_only_where_the_averages_are_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[bool] = []
    for on_cpu in (False, True):
        mean = Averages({"generator": network()}, 0.5, on_cpu=on_cpu)
        monkeypatch.setattr(averages, "synchronise", lambda on_cpu=on_cpu: waits.append(on_cpu))
        mean.update()
    assert waits == [True]
