"""The optimiser without a first moment against torch's AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aad1.train import adam
from aad1.train.adam import AdamW


def pair(seed: int = 0) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    torch.manual_seed(seed)
    values = [torch.randn(5, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    return tuple([nn.Parameter(v.clone()) for v in values] for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("at_once", [2**26, 1])
@pytest.mark.parametrize("fused", [False, True])
def test_it_is_adamw_with_beta1_zero(
    at_once: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam, "AT_ONCE", at_once)
    mine, theirs = pair()
    ours = AdamW(
        [{"params": mine[:1]}, {"params": mine[1:], "lr": 0.03}], 0.01, (0.0, 0.9),
        weight_decay=0.1, fused=fused,
    )  # fmt: skip
    reference = torch.optim.AdamW(
        [{"params": theirs[:1]}, {"params": theirs[1:], "lr": 0.03}], 0.01, (0.0, 0.9),
        weight_decay=0.1,
    )  # fmt: skip
    for step in range(5):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            a.grad = torch.randn_like(a) if i == 0 or step != 2 else None  # one is left out once
            b.grad = None if a.grad is None else a.grad.clone()
        ours.step()
        reference.step()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)
            if a.grad is not None:  # it stands in for the first moment, and stays as it was
                assert torch.equal(a.grad, b.grad)


def test_fused_kernels_agree_on_many_weights() -> None:
    """Tensors longer than a vector register or a thread's part, in float32."""
    torch.manual_seed(0)
    values = [torch.randn(n) for n in (1, 7, 1000, 100_003)]
    runs = []
    for fused in (False, True):
        torch.manual_seed(1)
        weights = [nn.Parameter(v.clone()) for v in values]
        optimizer = AdamW(weights, 0.01, (0.0, 0.99), fused=fused)
        for _ in range(3):
            for w in weights:
                w.grad = torch.randn_like(w)
            optimizer.step()
        runs.append(torch.cat([w.detach() for w in weights]))
    torch.testing.assert_close(*runs, atol=1e-6, rtol=1e-5)
    assert float((runs[0] - torch.cat(values)).abs().mean()) > 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_it_keeps_one_number_a_weight(fused: bool) -> None:
    (p, _), _ = pair()
    optimizer = AdamW([p], 0.01, fused=fused)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert sum(v.numel() for v in optimizer.state[p].values()) == p.numel() + 1


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_with_both_moments_it_is_torchs_too(
    on_cpu: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_cpu:  # as if the weights were elsewhere: what is brought to them is a copy
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self.clone())
    mine, theirs = pair()
    ours = AdamW(mine, 0.01, (0.9, 0.99), weight_decay=0.1, on_cpu=on_cpu, fused=fused)
    reference = torch.optim.AdamW(theirs, 0.01, (0.9, 0.99), weight_decay=0.1)
    for _ in range(4):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)
        for name in ("step", "exp_avg", "exp_avg_sq"):  # so a checkpoint of one is one of the other
            x, y = ours.state[a][name], reference.state[b][name]
            torch.testing.assert_close(x, y, atol=1e-14, rtol=1e-12, check_dtype=False)
