"""The graphed rollout against the plain one (needs CUDA)."""

from __future__ import annotations

import pytest
import torch

from aad1.core.chunks import ChunkGeometry
from aad1.models.dit import WanConfig, WanTransformer
from aad1.rollout.graph import GraphedRollout
from aad1.rollout.stream import Rollout
from aad1.stages.base import roll_out

TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=48, num_layers=2, text_dim=8,
    freq_dim=32, in_channels=4, out_channels=4,
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_replaying_equals_running_also_after_the_weights_have_changed(bf16: bool) -> None:
    torch.manual_seed(0)
    model = WanTransformer(TINY).cuda()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    rollout = Rollout(model, ChunkGeometry(), (1.0, 5 / 6))
    graphed = GraphedRollout(roll_out)
    for _ in range(2):
        for step in (0, 1):
            image = torch.randn(2, 4, 1, 2, 4, device="cuda")
            text = torch.randn(2, 9, 3, 8, device="cuda")
            noise = torch.randn(2, 2, 4, 8, 2, 4, device="cuda")
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                got = graphed(rollout, image, text, noise, step).x0.clone()
                want = roll_out(rollout, image, text, noise, step).x0
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        with torch.no_grad():  # as an optimiser does: in place
            for p in model.parameters():
                p.mul_(0.9)
