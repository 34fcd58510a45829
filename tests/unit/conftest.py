"""Tiny random models that several unit tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from aad1.model_info import ModelInfo, weights_hash
from aad1.models.codec import PixelCodec
from aad1.models.dit import WanConfig, WanTransformer
from aad1.models.text import WordEncoder, WordEncoderConfig
from aad1.pipeline import Pipeline

Build = Callable[..., Pipeline]


@pytest.fixture
def tiny_pipeline() -> Build:
    """build(stage="aad", codec=PixelCodec(4), size=16, **model_info) -> random Pipeline."""

    def build(stage: str = "aad", codec: object = None, size: int = 16, **info: object) -> Pipeline:
        torch.manual_seed(0)
        codec = codec or PixelCodec(4)
        channels = codec.latent_channels  # type: ignore[attr-defined]
        model = WanTransformer(
            WanConfig(
                num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=2, text_dim=8,
                freq_dim=16, in_channels=channels, out_channels=channels,
            )
        ).eval()  # fmt: skip
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.15)
        words = ("left", "right", "red", "disc", "moves")
        text = WordEncoder(WordEncoderConfig(words=words, length=4, dim=8)).eval()
        for p in text.parameters():
            torch.nn.init.normal_(p, std=2.0)
        facts = dict(world="sprites", width=size, height=size, fps=4.0, frames=9) | info
        return Pipeline(
            model, codec, text,  # type: ignore[arg-type]
            ModelInfo(stage=stage, sha256=weights_hash(model), **facts),  # type: ignore[arg-type]
        )  # fmt: skip

    return build
