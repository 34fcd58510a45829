"""The asymmetric discriminator: a bidirectional video backbone, one realism logit per video.

Learnable queries read the backbone's tokens through cross-attention after a few layers; their
outputs are joined, normalised and projected to the logit (paper, section on stage III). The
ablations are switches: a block-causal backbone, and one logit per frame instead of per video.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from aad1.core.chunks import ChunkGeometry, Plan, bidirectional, block_causal
from aad1.errors import UserError
from aad1.models.dit import Attention, FeedForward, WanConfig, WanTransformer, attend


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """What the paper ablates about the discriminator."""

    taps: tuple[int, ...] = (19, 29, 39)
    """Blocks (0-based) whose outputs carry a head; 13, 21, 29 for 30 layers."""
    causal: bool = False
    """Block-causal backbone (ablation) instead of the bidirectional one."""
    per_frame: bool = False
    """One logit per frame after the first (ablation) instead of one per video."""

    def __post_init__(self) -> None:
        if not self.taps or sorted(set(self.taps)) != list(self.taps) or self.taps[0] < 0:
            raise UserError(f"taps must be ascending block numbers, got {self.taps}")


class QueryHead(nn.Module):
    """h = q + CA(q, tokens); h += FFN(LN h): one learnable query over one layer's tokens."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.width
        self.query = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        self.query_norm = nn.RMSNorm(d, eps=config.eps)
        self.token_norm = nn.LayerNorm(d, eps=config.eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(d, eps=config.eps)
        self.ffn = FeedForward(d, config.ffn_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, L, D] -> [B, D]. (No masks: to restrict a query, hand over fewer tokens.)"""
        x = self.token_norm(tokens)
        k, v = self.attention.key_value(x)
        q = self.attention.query(self.query_norm(self.query)).expand(len(tokens), -1, -1, -1)
        h = self.query + self.attention.out(attend(q.to(k.dtype), k, v))
        h = h + self.ffn(self.ffn_norm(h))
        return h[:, 0]


class Discriminator(nn.Module):
    """D(x_tau, tau, text): logits [B] of whole videos, or [B, F - 1] of frames.

    backbone: a `WanTransformer` with the pretrained (teacher's) weights, trained along.
    """

    def __init__(
        self, backbone: WanTransformer, config: DiscriminatorConfig, geometry: ChunkGeometry
    ) -> None:
        super().__init__()
        layers = len(backbone.blocks)
        if config.taps[-1] >= layers:
            raise UserError(f"taps must be in 0..{layers - 1}, got {config.taps}")
        self.config, self.geometry = config, geometry
        self.backbone = backbone
        d = backbone.config.width
        self.heads = nn.ModuleList([QueryHead(backbone.config) for _ in config.taps])
        self.norm = nn.LayerNorm(d * len(config.taps), eps=backbone.config.eps)
        self.logit = nn.Linear(d * len(config.taps), 1)
        nn.init.normal_(self.logit.weight, std=0.02)
        nn.init.zeros_(self.logit.bias)

    def plan(self, frames: int) -> Plan:
        """Attention of the backbone: bidirectional, or block-causal as the generator's."""
        return block_causal(self.geometry, frames) if self.config.causal else bidirectional(frames)

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        """Noised latents [B, C, F, H, W], sigma [B], text as `WanTransformer`; logits float32."""
        tokens = self.backbone.features(
            latents, sigma, text, layers=self.config.taps, plan=self.plan(latents.shape[2])
        )
        return self.read(tokens)

    def read(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        """Logits from the tapped tokens, each [B, F, L, D]."""
        b, f = tokens[0].shape[:2]
        if self.config.per_frame:
            views = [t[:, 1:].flatten(0, 1) for t in tokens]
        else:
            views = [t.flatten(1, 2) for t in tokens]
        joined = torch.cat([h(t).float() for h, t in zip(self.heads, views, strict=True)], -1)
        with torch.autocast(joined.device.type, enabled=False):
            normed = self.norm(joined.to(self.norm.weight.dtype))
            logits = F.linear(normed, self.logit.weight, self.logit.bias).float()[:, 0]
        return logits.view(b, f - 1) if self.config.per_frame else logits

    def fresh_heads(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What __init__ draws from torch's global generator, by name and in its order, one tensor
        at a time: for a discriminator that was built on the meta device."""
        for name, part in self.named_modules():
            if name.startswith("backbone") or not list(part.parameters(recurse=False)):
                continue
            if isinstance(part, QueryHead):
                yield f"{name}.query", torch.randn(part.query.shape) * 0.02
                continue
            part.to_empty(device="cpu")
            part.reset_parameters()  # type: ignore[operator]
            if part is self.logit:
                nn.init.normal_(self.logit.weight, std=0.02)
                nn.init.zeros_(self.logit.bias)
            yield from ((f"{name}.{n}", p.detach()) for n, p in part.named_parameters())
            part.to_empty(device="meta")

    def head_parameters(self) -> list[nn.Parameter]:
        """Heads and query tokens (they learn faster than the backbone)."""
        inner = {id(p) for p in self.backbone.parameters()}
        return [p for p in self.parameters() if id(p) not in inner]
