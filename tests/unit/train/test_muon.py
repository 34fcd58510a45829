"""The stacked Muon takes torch.optim.Muon's steps."""

import copy

import pytest
import torch
from torch import nn

from aad1.train.muon import Muon, orthogonalise


def _net() -> nn.ParameterList:
    torch.manual_seed(0)
    shapes = [(24, 24), (24, 24), (48, 24), (24, 48), (48, 24)]
    return nn.ParameterList([nn.Parameter(torch.randn(s) * 0.1) for s in shapes])


def test_steps_equal_those_of_torch() -> None:
    ours, theirs = _net(), copy.deepcopy(_net())
    one = Muon(ours, lr=2e-2, weight_decay=0.1)
    two = torch.optim.Muon(
        theirs.parameters(), lr=2e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for update in range(4):
        torch.manual_seed(update)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        two.step()
    start = _net()
    for p, q, s in zip(ours, theirs, start, strict=True):
        moved = (q - s).norm()
        assert (p - q).norm() < 0.02 * moved  # bfloat16 inside, in another order of operations
        assert moved > 0.05


def test_orthogonalise_flattens_singular_values_both_ways_round() -> None:
    torch.manual_seed(1)
    for shape in ((3, 16, 16), (3, 16, 40), (3, 40, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.min() > 0.2
        assert values.max() < 1.4


def test_continues_from_a_state_dict() -> None:
    nets = [_net(), _net()]
    grads = [torch.randn_like(p) for p in nets[0]]
    optimizers = [Muon(net, lr=1e-2) for net in nets]

    def step(net: nn.ParameterList, optimizer: Muon) -> None:
        for p, g in zip(net, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()

    step(nets[0], optimizers[0])
    step(nets[0], optimizers[0])
    step(nets[1], optimizers[1])
    resumed = Muon(nets[1], lr=1e-2)
    resumed.load_state_dict(optimizers[1].state_dict())
    step(nets[1], resumed)
    for p, q in zip(*nets, strict=True):
        assert torch.equal(p, q)


def test_refuses_vectors() -> None:
    with pytest.raises(ValueError, match=r"\[5\]"):
        Muon([nn.Parameter(torch.zeros(5))], lr=1e-2)
