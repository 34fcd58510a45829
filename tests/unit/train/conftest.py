"""A tiny Wan in diffusers' layout, saved by diffusers' and transformers' own classes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from aad1.media.writing import write_video
from wan_files import write_tokenizer

LENGTH, DIM = 12, 24


class TinyUmt5:
    """The smallest prompt encoder over transformers' UMT5: words hashed, padding rows zero."""

    length, dim = LENGTH, DIM

    def __init__(self, folder: Path) -> None:
        from transformers import UMT5EncoderModel

        self.model = UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()
        self.calls: list[str] = []

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        self.calls += prompts
        out = torch.zeros(len(prompts), LENGTH, DIM)
        for i, prompt in enumerate(prompts):
            ids = [2 + zlib.crc32(word.encode()) % 60 for word in prompt.split()][: LENGTH - 1]
            ids.append(1)
            hidden = self.model(input_ids=torch.tensor([ids])).last_hidden_state
            out[i, : len(ids)] = hidden[0]
        return out


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformer/, vae/, text_encoder/ and tokenizer/ with random weights."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-wan")
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=48, num_layers=3, text_dim=DIM,
        freq_dim=16,
    )  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder / "transformer")
    vae = diffusers.AutoencoderKLWan(base_dim=4, num_res_blocks=1, dim_mult=[1, 1, 1, 1])
    vae.save_pretrained(folder / "vae")
    config = transformers.UMT5Config(
        vocab_size=64, d_model=DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=3
    )
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def tiny_umt5(tiny_wan: Path) -> TinyUmt5:
    return TinyUmt5(tiny_wan)


def moving(frames: int, level: int) -> torch.Tensor:
    """A bright square that moves over a grey ground."""
    video = torch.full((frames, 48, 64, 3), level, dtype=torch.uint8)
    for t in range(frames):
        video[t, 8:24, t % 40 : t % 40 + 16] = 250
    return video


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good videos of 17 frames, one of 34 (two clips), and all kinds of bad ones."""
    folder = tmp_path_factory.mktemp("videos")
    for k in range(6):
        write_video(folder / f"v{k}.mp4", moving(17, 30 + 20 * k), 16, scale=1)
        (folder / f"v{k}.txt").write_text("a square moves" if k % 2 else f"scene number {k}")
    write_video(folder / "long.mp4", moving(34, 60), 16, scale=1)
    (folder / "captions.jsonl").write_text('{"file": "long.mp4", "caption": "a long scene"}\n')
    good = (folder / "v0.mp4").read_bytes()
    (folder / "copy.mp4").write_bytes(good)
    (folder / "cut.mp4").write_bytes(good[: len(good) // 2])
    (folder / "empty.mp4").touch()
    write_video(folder / "short.mp4", moving(5, 99), 16, scale=1)
    for name in ("copy", "cut", "empty", "short"):
        (folder / f"{name}.txt").write_text("a bad one")
    write_video(folder / "silent.mp4", moving(17, 200), 16, scale=1)
    return folder
