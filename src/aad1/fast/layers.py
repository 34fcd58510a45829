"""A block's weights as the fast path multiplies by them: q, k and v in one, float8 if asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch

from aad1.fast.ops import Linear, quantise_rows
from aad1.models.dit import Attention, Block


class Layer(NamedTuple):
    """Weights of one block."""

    qkv: Linear
    kv: Linear
    """The part of qkv that the cache pass of the last layer needs."""
    out: Linear
    norm_q: torch.Tensor
    norm_k: torch.Tensor
    text_q: Linear
    text_out: Linear
    text_norm_q: torch.Tensor
    norm_scale: torch.Tensor
    """The second norm's weight - 1, and its bias: float32 [1, 1, 1, D]."""
    norm_shift: torch.Tensor
    up: Linear
    down: Linear


def made_ready(block: Block, fp8: bool) -> Layer:
    """The block's own weights, shared but for float8 copies; q, k and v become views of one."""
    attn, cross, ffn = block.attn1, block.attn2, block.ffn
    pack = _quantised if fp8 else _plain
    qkv = pack(_joined(attn))
    return Layer(
        qkv=qkv,
        kv=qkv.rows(attn.to_q.out_features),
        out=pack(_of(attn.to_out[0])),
        norm_q=attn.norm_q.weight.detach(),
        norm_k=attn.norm_k.weight.detach(),
        text_q=pack(_of(cross.to_q)),
        text_out=pack(_of(cross.to_out[0])),
        text_norm_q=cross.norm_q.weight.detach(),
        norm_scale=_row(block.norm2.weight) - 1,
        norm_shift=_row(block.norm2.bias),
        up=pack(_of(ffn.net[0].proj)),  # type: ignore[arg-type]
        down=pack(_of(ffn.net[2])),
    )


def _row(values: torch.Tensor) -> torch.Tensor:
    return values.detach().float()[None, None, None]


def _of(layer: torch.nn.Module) -> Linear:
    assert isinstance(layer, torch.nn.Linear)
    return Linear(layer.weight.detach(), layer.bias.detach())


def _joined(attn: Attention) -> Linear:
    """q, k and v as one layer; the model's own parameters become views of it."""
    three = (attn.to_q, attn.to_k, attn.to_v)
    weight = torch.cat([layer.weight.detach() for layer in three])
    bias = torch.cat([layer.bias.detach() for layer in three])
    for layer, w, b in zip(three, weight.chunk(3), bias.chunk(3), strict=True):
        layer.weight.data, layer.bias.data = w, b
    return Linear(weight, bias)


def _plain(layer: Linear) -> Linear:
    return layer


def _quantised(layer: Linear) -> Linear:
    weight, scale = quantise_rows(layer.weight)
    return Linear(weight, layer.bias, scale)
