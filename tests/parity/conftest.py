"""A tiny Wan 2.1 with random weights, made of diffusers' and transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = 'a cat walks dog red blurred two & <b> "it\'s"'


def randomise(module: torch.nn.Module, std: float) -> None:
    """Every weight and bias drawn anew: default values (ones, zeros) would hide mistakes."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS.split()]
    pieces += [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz&<>'.,;\"é"]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)


@pytest.fixture(scope="session")
def diffusers_wan(tiny_tokenizer: Any) -> Any:
    """diffusers' WanPipeline in float32, flow shift 3, UniPC; two heads of Wan's own width."""
    diffusers = pytest.importorskip("diffusers")
    import transformers

    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=16,
        freq_dim=32, ffn_dim=48, num_layers=2,
    )  # fmt: skip
    randomise(transformer, 0.1)
    for block in transformer.blocks:  # or a few rows among 512 of padding would hardly matter
        torch.nn.init.normal_(block.attn2.to_v.weight, std=2.0)
    encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )
    )  # fmt: skip
    randomise(encoder, 0.5)
    vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(
        tokenizer=tiny_tokenizer, text_encoder=encoder.eval(), vae=vae.eval(), scheduler=scheduler,
        transformer=transformer.eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def wan_folder(diffusers_wan: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as diffusers saves it. Not to be written to: copy it first."""
    folder = tmp_path_factory.mktemp("wan") / "Wan2.1-tiny"
    diffusers_wan.save_pretrained(folder)
    return folder
