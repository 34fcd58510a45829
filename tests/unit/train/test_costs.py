"""Formulas of work and activations against what torch itself counts on small networks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from aad1.core.chunks import ChunkGeometry, Plan, bidirectional, block_causal
from aad1.models.discriminator import Discriminator, DiscriminatorConfig
from aad1.models.dit import WanConfig, WanTransformer
from aad1.rollout.stream import Rollout
from aad1.stages.base import roll_out
from aad1.train import costs
from aad1.train.blocks import checkpoint_blocks
from aad1.train.costs import Clip

GEOMETRY = ChunkGeometry(chunk=2, sink=1, window=5)
CONFIG = WanConfig(
    num_attention_heads=3, attention_head_dim=8, ffn_dim=40, num_layers=3, text_dim=10, freq_dim=16
)
CLIP = Clip(frames=9, tokens=6, text=7)


def inputs(prompts_per_frame: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randn(1, CLIP.frames, CLIP.text, 10)
    return torch.randn(1, 16, CLIP.frames, 4, 6), text if prompts_per_frame else text[:, 0]


class Counter(FlopCounterMode):
    def __init__(self) -> None:
        super().__init__(display=False)


def counted(call: Any) -> float:
    with Counter() as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("plan", [bidirectional(9), block_causal(GEOMETRY, 9)])
@pytest.mark.parametrize("per_frame", [True, False])
def test_work_of_a_pass_is_what_torch_counts(plan: Plan, per_frame: bool) -> None:
    model = WanTransformer(CONFIG)
    x, text = inputs(per_frame)
    prompts = 9 if per_frame else 1
    with torch.no_grad():
        got = counted(lambda: model(x, torch.ones(1), text, plan=plan))
        kv = counted(lambda: model.keys_values(x, torch.ones(1), text, plan=plan))
        levels = counted(lambda: model(x, torch.ones(1, 9), text, plan=plan))
    assert costs.transformer(CONFIG, CLIP, plan, prompts=prompts).forward == got
    assert costs.cache_pass(CONFIG, CLIP, plan, prompts=prompts).forward == kv
    assert costs.transformer(CONFIG, CLIP, plan, prompts=prompts, levels=9).forward == levels


@pytest.mark.parametrize("per_frame,causal", [(False, False), (True, False), (False, True)])
def test_work_of_the_discriminator(per_frame: bool, causal: bool) -> None:
    config = DiscriminatorConfig(taps=(0, 1), per_frame=per_frame, causal=causal)
    critic = Discriminator(WanTransformer(CONFIG), config, GEOMETRY)
    x, text = inputs()
    with torch.no_grad():
        got = counted(lambda: critic(x, torch.ones(1), text))
    assert costs.discriminator(CONFIG, CLIP, GEOMETRY, config).forward == got


@pytest.mark.parametrize("sigmas", [(1.0,), (1.0, 0.8)])
def test_work_of_a_rollout_and_its_replay(sigmas: tuple[float, ...]) -> None:
    from aad1.rollout.stream import replay

    model = WanTransformer(CONFIG)
    rollout = Rollout(model, GEOMETRY, sigmas)
    x, text = inputs()
    noise = torch.randn(len(sigmas), 1, 16, 8, 4, 6)
    recorded: list[Any] = []
    got = counted(lambda: recorded.append(roll_out(rollout, x[:, :, :1], text, noise)))
    assert costs.rollout(CONFIG, CLIP, GEOMETRY, len(sigmas)).forward == got
    (past_k, _), *_ = recorded[0].past
    assert past_k.nbytes * 2 * 3 == costs.cache_bytes(CONFIG, CLIP, 7, bf16=False)
    with torch.no_grad():
        again = counted(lambda: replay(rollout, recorded[0], text))
    assert costs.replay(CONFIG, CLIP, GEOMETRY).forward == again


def test_work_of_a_backward_pass() -> None:
    model = WanTransformer(CONFIG)
    x, text = inputs()
    plan = bidirectional(9)
    work = costs.transformer(CONFIG, CLIP, plan, prompts=9)
    whole = counted(lambda: model(x.requires_grad_(), torch.ones(1), text).sum().backward())
    # All of it but the gradient in the text, which is given, and the noise level's embedding.
    assert whole == pytest.approx(work.training(False), rel=0.05)
    model.requires_grad_(False)
    frozen = counted(lambda: model(x, torch.ones(1), text).sum().backward())
    assert frozen == pytest.approx(work.to_input(False), rel=0.1)
    checkpoint_blocks(model.requires_grad_(True))
    again = counted(lambda: model(x, torch.ones(1), text).sum().backward())
    assert again == pytest.approx(work.training(True), rel=0.05)


def test_work_at_full_size_is_the_known_one() -> None:
    """82 + 198 TFLOP at 1.3B, 783 + 879 at 14B, for 21 frames of 1560 tokens."""
    clip = Clip(frames=21, tokens=1560)
    large = WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40)
    for config, linear, attention in ((WanConfig(), 82, 198), (large, 783, 879)):
        work = costs.transformer(config, clip, bidirectional(21), prompts=1)
        cross = 4 * config.width * clip.frames * clip.tokens * 512 * config.num_layers
        assert work.linear / 1e12 == pytest.approx(linear, rel=0.01)
        assert (work.attention - cross) / 1e12 == pytest.approx(attention, rel=0.01)


class Live(TorchDispatchMode):
    """Bytes of all storages made inside that are still alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.refs: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.refs[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, self.bytes())
        return out

    def bytes(self) -> int:
        self.refs = {k: v for k, v in self.refs.items() if not v[0].expired()}
        return sum(size for _, size in self.refs.values())


def kept(config: WanConfig, clip: Clip, plan: Plan, bf16: bool, checkpointed: bool) -> int:
    """Bytes alive after a forward pass; weights are counted along, and drop out in differences."""
    model = WanTransformer(config)
    if checkpointed:
        checkpoint_blocks(model)
    x = torch.randn(1, 16, clip.frames, 4, clip.tokens)
    text = torch.randn(1, clip.frames, clip.text, config.text_dim)
    model(x, torch.ones(1), text, plan=plan)  # RoPE tables are built
    with Live() as live, torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        out = model(x, torch.ones(1), text, plan=plan)
        size = live.bytes()
    assert out.requires_grad
    return size


@pytest.mark.parametrize("width,ffn", [(3, 40), (2, 200)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_block_keeps(width: int, ffn: int, causal: bool, bf16: bool) -> None:
    from dataclasses import replace

    warnings.simplefilter("ignore", UserWarning)  # rms_norm in mixed precision

    def per_block(frames: int, checkpointed: bool) -> int:
        clip = replace(CLIP, frames=frames)
        plan = block_causal(GEOMETRY, frames) if causal else bidirectional(frames)
        config = replace(CONFIG, num_attention_heads=width, ffn_dim=ffn)
        deep, flat = (replace(config, num_layers=n) for n in (3, 2))
        return kept(deep, clip, plan, bf16, checkpointed) - kept(
            flat, clip, plan, bf16, checkpointed
        )

    def formula(frames: int) -> int:
        clip = replace(CLIP, frames=frames)
        plan = block_causal(GEOMETRY, frames) if causal else bidirectional(frames)
        config = replace(CONFIG, num_attention_heads=width, ffn_dim=ffn)
        return costs.kept_by_block(config, clip, plan, prompts=frames, bf16=bf16)

    # Weights do not grow with the clip: the difference of two lengths is activations alone.
    assert per_block(11, False) - per_block(9, False) == formula(11) - formula(9)
    assert per_block(11, True) - per_block(9, True) == 4 * 2 * CLIP.tokens * 8 * width


@pytest.mark.parametrize("bf16", [False, True])
def test_the_height_of_a_checkpointed_backward_pass(bf16: bool) -> None:
    warnings.simplefilter("ignore", UserWarning)
    config = WanConfig(
        num_attention_heads=4, attention_head_dim=16, ffn_dim=256, num_layers=3, text_dim=8,
        freq_dim=16,
    )  # fmt: skip

    def peak(frames: int) -> tuple[int, float]:
        clip = Clip(frames=frames, tokens=64, text=2)
        model = WanTransformer(config)
        checkpoint_blocks(model)
        x, text = torch.randn(1, 16, frames, 4, 64), torch.randn(1, frames, 2, 8)
        model(x, torch.ones(1), text).sum().backward()
        with Live() as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(x, torch.ones(1), text).sum()
            loss.backward()
        told = costs.graph(
            config, clip, bidirectional(frames), prompts=frames, bf16=bf16, checkpointed=True
        )
        return live.most, told

    (short, told_short), (long, told_long) = peak(5), peak(13)
    assert long - short == pytest.approx(told_long - told_short, rel=0.1)


def test_a_recorded_rollout_holds_its_keys_and_values_once() -> None:
    """What each further frame adds at the height: its K and V once, not again while joined."""
    from dataclasses import replace

    config = replace(CONFIG, num_layers=6, ffn_dim=8, attention_head_dim=32)
    rollout = Rollout(WanTransformer(config), GEOMETRY)

    def peak(count: int) -> int:
        x, text = torch.randn(1, 16, count, 4, 6), torch.randn(1, count, 2, 10)
        noise = torch.randn(1, 1, 16, count - 1, 4, 6)
        roll_out(rollout, x[:, :, :1], text, noise)  # RoPE tables are built
        with Live() as live:
            recorded = roll_out(rollout, x[:, :, :1], text, noise)
            most = live.most
        assert sum(k.nbytes + v.nbytes for k, v in recorded.past) == costs.cache_bytes(
            config, CLIP, count - 2, bf16=False
        )
        return most

    # Besides, latents; and one layer's pieces while they are joined.
    added = (peak(9) - peak(5)) / costs.cache_bytes(config, CLIP, 4, bf16=False)
    assert 1 <= added < 1.5
