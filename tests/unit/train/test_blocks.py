"""What is compiled: every shape and plan once, without a break, and nothing that is rare."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from aad1.core.chunks import ChunkGeometry
from aad1.models.discriminator import Discriminator, DiscriminatorConfig
from aad1.models.dit import Block, WanConfig, WanTransformer
from aad1.rollout.stream import Rollout
from aad1.stages.adversarial import Adversarial, AdversarialConfig
from aad1.stages.base import Batch, Conditioner
from aad1.train.blocks import compile_blocks, plain_blocks, uncompiled

CONFIG = WanConfig(
    num_attention_heads=2, attention_head_dim=8, ffn_dim=16, num_layers=2, text_dim=8, freq_dim=16,
    in_channels=4, out_channels=4, rope_theta=10.0, patch_size=(1, 1, 1),
)  # fmt: skip
GEOMETRY = ChunkGeometry()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Blocks compiled without the code generator; the number of graphs so far."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    compile_blocks()
    yield lambda: counters["stats"]["unique_graphs"]
    plain_blocks()
    torch._dynamo.reset()


def words(prompts: list[str]) -> torch.Tensor:
    return torch.ones(len(prompts), 3, 8)


def network() -> WanTransformer:
    torch.manual_seed(0)
    return WanTransformer(CONFIG)


def adversarial(causal: bool) -> Adversarial:
    critic = Discriminator(network(), DiscriminatorConfig(taps=(0, 1), causal=causal), GEOMETRY)
    rollout = Rollout(network(), GEOMETRY)
    return Adversarial(rollout, critic, Conditioner(words, GEOMETRY), AdversarialConfig())


def steps(stage: Adversarial) -> float:
    data = Batch(torch.randn(2, 4, 17, 2, 2), [["a"]] * 2)
    total = 0.0
    for number in range(2):
        for part in (stage.critic_loss, stage.generator_loss):
            loss, _ = part(data, torch.Generator().manual_seed(number))
            loss.backward()
            total += float(loss.detach())
    return total


def test_a_stage_is_compiled_once_for_each_shape_and_plan(compiled: Any) -> None:
    stage = adversarial(causal=False)
    steps(stage)
    # The second chunk and later ones of a rollout; a pair for the critic, a clip for the
    # generator; the generator's replay. The image and passes for K and V alone are not.
    assert compiled() == 5
    steps(adversarial(causal=False))
    assert compiled() == 5  # other networks of the same kind use the same
    steps(adversarial(causal=True))
    assert compiled() == 7
    assert not counters["graph_break"]


def test_rare_passes_are_left_plain(compiled: Any) -> None:
    model = network()
    fast = Block.forward
    with uncompiled():
        model(torch.randn(3, 4, 9, 2, 2), torch.ones(3), torch.ones(3, 3, 8))
        assert Block.forward is not fast
    assert Block.forward is fast and compiled() == 0
    model(torch.randn(3, 4, 1, 2, 2), torch.ones(3), torch.ones(3, 3, 8))
    assert compiled() == 0
    model(torch.randn(3, 4, 5, 2, 2), torch.ones(3), torch.ones(3, 3, 8))
    assert compiled() == 1


def test_compiled_blocks_give_the_same(compiled: Any) -> None:
    want = 0.0
    with uncompiled():
        torch.manual_seed(1)
        stage = adversarial(causal=True)
        torch.manual_seed(2)
        want = steps(stage)
    torch.manual_seed(1)
    stage = adversarial(causal=True)
    torch.manual_seed(2)
    assert steps(stage) == pytest.approx(want, rel=1e-5)
