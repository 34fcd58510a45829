"""Blocks in host memory: the same numbers, and never more than two on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aad1 import cli
from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.model_info import weights_hash
from aad1.models.dit import Block, WanConfig, WanTransformer
from aad1.models.offload import StreamedBlocks, offload_blocks
from aad1.pipeline import Pipeline
from aad1.rollout.stream import Rollout, seeded_noise

CPU = torch.device("cpu")


def network(layers: int, dtype: torch.dtype = torch.float32) -> WanTransformer:
    torch.manual_seed(layers)
    model = WanTransformer(
        WanConfig(num_attention_heads=2, attention_head_dim=12, ffn_dim=20, num_layers=layers,
                  text_dim=6, freq_dim=8, in_channels=4, out_channels=4)
    )  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.cast(dtype).eval()


def frames(model: WanTransformer, chunks: int = 3) -> torch.Tensor:
    geometry = ChunkGeometry(chunk=2, sink=1, window=5)
    device = model.device
    text = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(1)).to(device)
    noise = seeded_noise([0], geometry, (4, 4, 4), device)
    rollout = Rollout(model, geometry, (1.0, 0.8))
    image = torch.ones(1, 4, 1, 4, 4, device=device)
    return torch.cat(list(rollout.stream(image, lambda _: text, noise, chunks)), 2)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_the_numbers_are_the_same(layers: int, dtype: torch.dtype) -> None:
    plain, streamed = network(layers, dtype), offload_blocks(network(layers, dtype), CPU)
    assert torch.equal(frames(streamed), frames(plain))
    x, text = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 3, 6)
    sigma = torch.tensor([0.3, 0.9])
    for _ in range(2):
        assert torch.equal(streamed(x, sigma, text), plain(x, sigma, text))
        for got, want in zip(
            streamed.keys_values(x, sigma, text), plain.keys_values(x, sigma, text), strict=True
        ):
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        for layer in range(layers):
            (got_x,) = streamed.features(x, sigma, text, layers=[layer])
            (want_x,) = plain.features(x, sigma, text, layers=[layer])
            assert torch.equal(got_x, want_x)
    assert weights_hash(streamed) == weights_hash(plain)


def test_two_blocks_at_most_are_on_the_device() -> None:
    model = offload_blocks(network(5), CPU)
    blocks = model.blocks
    assert isinstance(blocks, StreamedBlocks)
    room = [slot.buffer for slot in blocks._slots]
    assert sum(b.nbytes for b in room) <= 2.5 * sum(p.nbytes for p in blocks[0].parameters())

    def places() -> list[bool]:
        """For every block, whether its parameters lie on the device."""
        out = []
        for block in blocks._modules.values():
            assert block is not None
            within = {
                any(b.data_ptr() <= p.data_ptr() < b.data_ptr() + b.nbytes for b in room)
                for p in block.parameters()
            }
            assert len(within) == 1
            out.append(within.pop())
        return out

    seen: list[int] = []

    def check(i: int) -> None:
        seen.append(i)
        assert places()[i] and sum(places()) <= 2
        assert i in blocks.resident and len(blocks.resident) <= 2
        assert (i + 1) % 5 in blocks.resident  # the next one is on its way

    for i, block in enumerate(blocks._modules.values()):
        assert isinstance(block, Block)
        block.register_forward_pre_hook(lambda *_, i=i: check(i))  # type: ignore[misc]
    frames(model)
    # A prefill, two cache passes (the last block only for its keys), three chunks of two steps.
    assert seen.count(0) == 9 and seen.count(4) == 9


def test_a_block_that_is_not_brought_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    bring = StreamedBlocks._bring

    def lazy(self: StreamedBlocks, number: int, slot: Any) -> None:
        before = slot.buffer.clone()
        bring(self, number, slot)
        if number == 1:
            slot.buffer.copy_(before)

    plain, streamed = network(3), offload_blocks(network(3), CPU)
    monkeypatch.setattr(StreamedBlocks, "_bring", lazy)
    assert not torch.equal(frames(streamed), frames(plain))


def test_offloaded_weights_are_saved_whole(tmp_path: Path) -> None:
    model = offload_blocks(network(4), CPU)
    frames(model)
    model.save_pretrained(tmp_path)
    assert weights_hash(WanTransformer.from_pretrained(tmp_path)) == weights_hash(network(4))


def test_it_needs_cuda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="offload is for CUDA devices .*; the device is cpu"):
        Pipeline.from_pretrained("sprites", offload=True)
    out = tmp_path / "o.mp4"
    image = "src/aad1/packaged/sprites_frames/00.png"
    assert cli.main(["generate", "--model", "sprites", "--image", image, "--device", "cpu",
                     "--offload", "--out", str(out)]) == 2  # fmt: skip
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "offload is for CUDA devices" in error
    assert not out.exists()


@pytest.mark.gpu
@torch.inference_mode()
def test_on_a_gpu_the_numbers_are_the_same_and_memory_is_that_of_two_blocks() -> None:
    device = torch.device("cuda")
    config = WanConfig(num_attention_heads=8, ffn_dim=4096, num_layers=24, text_dim=6)

    def large() -> WanTransformer:
        torch.manual_seed(0)
        model = WanTransformer(config).cast(torch.bfloat16).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02)
        return model

    x, text = torch.randn(1, 16, 5, 32, 32, device=device), torch.randn(1, 9, 6, device=device)
    sigma = torch.ones(1, device=device)
    plain = large().to(device)
    want = [plain(x, sigma * s, text) for s in (1.0, 0.7, 0.4)]
    whole = sum(p.nbytes for p in plain.blocks.parameters())
    del plain
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    streamed = offload_blocks(large(), device)
    assert torch.cuda.memory_allocated() - before < whole / 4
    for s, expected in zip((1.0, 0.7, 0.4), want, strict=True):
        assert torch.equal(streamed(x, sigma * s, text), expected)
