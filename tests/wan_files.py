"""Tiny random Wan weights under their original names, and the layouts they are published in.

Names and shapes are written out here from the published models, independently of the maps in
`aad1.models.wan_keys`, which are under test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from aad1.models.checkpoints import find_part
from aad1.models.wan_shapes import umt5_json

State = dict[str, Tensor]

WIDTH, HEADS, FFN, LAYERS, TEXT, FREQ = 256, 2, 64, 2, 16, 32
"""Of the tiny transformer: two heads of Wan's own width 128."""


def _linear(state: State, name: str, out: int, inner: int, std: float) -> None:
    state[f"{name}.weight"] = std * torch.randn(out, inner)
    state[f"{name}.bias"] = std * torch.randn(out)


def original_transformer(
    width: int = WIDTH,
    layers: int = LAYERS,
    ffn: int = FFN,
    text: int = TEXT,
    channels: int = 16,
    freq: int = FREQ,
    seed: int = 0,
) -> State:
    """A Wan transformer's state dict as Wan's own code names it; no two tensors are alike."""
    torch.manual_seed(seed)
    std = width**-0.5
    state: State = {
        "patch_embedding.weight": std * torch.randn(width, channels, 1, 2, 2),
        "patch_embedding.bias": std * torch.randn(width),
    }
    _linear(state, "text_embedding.0", width, text, 0.3)
    _linear(state, "text_embedding.2", width, width, std)
    _linear(state, "time_embedding.0", width, freq, 0.3)
    _linear(state, "time_embedding.2", width, width, std)
    _linear(state, "time_projection.1", 6 * width, width, std)
    for i in range(layers):
        block = f"blocks.{i}"
        state[f"{block}.modulation"] = 0.3 * torch.randn(1, 6, width)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                _linear(state, f"{block}.{attention}.{part}", width, width, std)
            for part in ("norm_q", "norm_k"):
                state[f"{block}.{attention}.{part}.weight"] = 1 + 0.3 * torch.randn(width)
        state[f"{block}.norm3.weight"] = 1 + 0.3 * torch.randn(width)
        state[f"{block}.norm3.bias"] = 0.3 * torch.randn(width)
        _linear(state, f"{block}.ffn.0", ffn, width, std)
        _linear(state, f"{block}.ffn.2", width, ffn, ffn**-0.5)
    state["head.modulation"] = 0.3 * torch.randn(1, 2, width)
    _linear(state, "head.head", channels * 4, width, std)
    return state


def _conv(state: State, name: str, out: int, inner: int, *kernel: int) -> None:
    std = (inner * torch.Size(kernel).numel()) ** -0.5
    state[f"{name}.weight"] = std * torch.randn(out, inner, *kernel)
    state[f"{name}.bias"] = std * torch.randn(out)


def _residual(state: State, name: str, inner: int, out: int) -> None:
    state[f"{name}.residual.0.gamma"] = 1 + 0.1 * torch.randn(inner, 1, 1, 1)
    _conv(state, f"{name}.residual.2", out, inner, 3, 3, 3)
    state[f"{name}.residual.3.gamma"] = 1 + 0.1 * torch.randn(out, 1, 1, 1)
    _conv(state, f"{name}.residual.6", out, out, 3, 3, 3)
    if inner != out:
        _conv(state, f"{name}.shortcut", out, inner, 1, 1, 1)


def _middle(state: State, name: str, width: int) -> None:
    _residual(state, f"{name}.0", width, width)
    state[f"{name}.1.norm.gamma"] = 1 + 0.1 * torch.randn(width, 1, 1)
    _conv(state, f"{name}.1.to_qkv", 3 * width, width, 1, 1)
    _conv(state, f"{name}.1.proj", width, width, 1, 1)
    _residual(state, f"{name}.2", width, width)


def original_vae(base: int = 8, blocks: int = 2, z: int = 16, seed: int = 1) -> State:
    """Wan 2.1's autoencoder (stages of 1, 2, 4, 4 times `base`) as Wan's own code names it."""
    torch.manual_seed(seed)
    widths = [base, 2 * base, 4 * base, 4 * base]
    state: State = {}
    _conv(state, "encoder.conv1", base, 3, 3, 3, 3)
    row, inner = 0, base
    for stage, width in enumerate(widths):
        for _ in range(blocks):
            _residual(state, f"encoder.downsamples.{row}", inner, width)
            row, inner = row + 1, width
        if stage < 3:
            _conv(state, f"encoder.downsamples.{row}.resample.1", width, width, 3, 3)
            if stage > 0:
                _conv(state, f"encoder.downsamples.{row}.time_conv", width, width, 3, 1, 1)
            row += 1
    _middle(state, "encoder.middle", inner)
    state["encoder.head.0.gamma"] = 1 + 0.1 * torch.randn(inner, 1, 1, 1)
    _conv(state, "encoder.head.2", 2 * z, inner, 3, 3, 3)
    _conv(state, "conv1", 2 * z, 2 * z, 1, 1, 1)
    _conv(state, "conv2", z, z, 1, 1, 1)
    inner = widths[-1]
    _conv(state, "decoder.conv1", inner, z, 3, 3, 3)
    _middle(state, "decoder.middle", inner)
    row = 0
    for stage, width in enumerate(reversed(widths)):
        for _ in range(blocks + 1):
            _residual(state, f"decoder.upsamples.{row}", inner, width)
            row, inner = row + 1, width
        if stage < 3:
            _conv(state, f"decoder.upsamples.{row}.resample.1", width // 2, width, 3, 3)
            if stage < 2:
                _conv(state, f"decoder.upsamples.{row}.time_conv", 2 * width, width, 3, 1, 1)
            row, inner = row + 1, width // 2
    state["decoder.head.0.gamma"] = 1 + 0.1 * torch.randn(inner, 1, 1, 1)
    _conv(state, "decoder.head.2", 3, inner, 3, 3, 3)
    return state


def original_umt5(
    width: int = TEXT, heads: int = 2, inner: int = 24, ffn: int = 40, layers: int = 2,
    words: int = 64, buckets: int = 32, seed: int = 2,
) -> State:  # fmt: skip
    """The encoder of UMT5 as Wan's own code names it."""
    torch.manual_seed(seed)
    state: State = {"token_embedding.weight": torch.randn(words, width)}
    for i in range(layers):
        block = f"blocks.{i}"
        state[f"{block}.norm1.weight"] = 1 + 0.3 * torch.randn(width)
        for part in "qkv":
            state[f"{block}.attn.{part}.weight"] = 0.3 * torch.randn(inner, width)
        state[f"{block}.attn.o.weight"] = 0.3 * torch.randn(width, inner)
        state[f"{block}.norm2.weight"] = 1 + 0.3 * torch.randn(width)
        state[f"{block}.ffn.gate.0.weight"] = 0.3 * torch.randn(ffn, width)
        state[f"{block}.ffn.fc1.weight"] = 0.3 * torch.randn(ffn, width)
        state[f"{block}.ffn.fc2.weight"] = 0.3 * torch.randn(width, ffn)
        state[f"{block}.pos_embedding.embedding.weight"] = torch.randn(buckets, heads)
    state["norm.weight"] = 1 + 0.3 * torch.randn(width)
    return state


def original_config(width: int = WIDTH, heads: int = HEADS) -> dict[str, object]:
    """config.json of Wan's own release."""
    return {
        "_class_name": "WanModel", "model_type": "t2v", "dim": width, "eps": 1e-6, "ffn_dim": FFN,
        "freq_dim": FREQ, "in_dim": 16, "num_heads": heads, "num_layers": LAYERS, "out_dim": 16,
        "text_len": 512,
    }  # fmt: skip


def read_umt5(path: Path) -> tuple[dict[str, Any], State]:
    """(arguments of `UMT5Config`, state dict of `UMT5EncoderModel`) as aad1 reads them."""
    source = find_part(path, "text_encoder")
    state = dict(source.read())
    return umt5_json(source), state | {"encoder.embed_tokens.weight": state["shared.weight"]}


def write_tokenizer(folder: Path, words: int = 64) -> None:
    """A tokenizer of single characters with T5's class and special tokens."""
    pieces = ["<pad>", "</s>", "<unk>", *(chr(ord("a") + i) for i in range(words - 3))]
    vocabulary = [[piece, 0.0 if i < 3 else -float(i)] for i, piece in enumerate(pieces)]
    folder.mkdir(parents=True)
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocabulary, "byte_fallback": False},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", **names})
    )


def write_sharded(folder: Path, stem: str, state: Mapping[str, Tensor], shards: int) -> None:
    """Safetensors shards with an index, as the hub names them."""
    folder.mkdir(parents=True, exist_ok=True)
    names, where = list(state), {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({n: state[n] for n in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def write_original(folder: Path, shards: int = 1, **sizes: int) -> State:
    """The layout of Wan's own release, all parts in it; returns the transformer's state."""
    transformer = original_transformer(**sizes)
    folder.mkdir(parents=True, exist_ok=True)
    if shards > 1:
        write_sharded(folder, "diffusion_pytorch_model", transformer, shards)
    else:
        save_file(transformer, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(original_config()))
    torch.save(original_vae(), folder / "Wan2.1_VAE.pth")
    torch.save(original_umt5(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(folder / "google" / "umt5-xxl")
    return transformer
