"""The Wan 2.1 diffusion transformer: one network for every role.

Generator, teacher, real score, fake score and discriminator backbone are all this class; they
differ only in the attention plan (`aad1.core.chunks`) that a pass is given. Parameter names are
those of diffusers' `WanTransformer3DModel`, so folders are exchanged with it both ways.

Shape suffixes: B batch, F latent frames, L tokens per frame, N heads, D width, S text rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from aad1.core import chunks as plans
from aad1.core.chunks import Group, Plan
from aad1.core.flow import per_frame
from aad1.core.kv_cache import KV, frames_of
from aad1.core.rope import rope_table, rotate
from aad1.errors import UserError

MIN_SIGMA = 0.05
"""Smallest divisor when an x0-predicting network's output is turned into a velocity."""

FP32_PARTS = ("time_embedder", "scale_shift_table", "norm2")
"""What steers every layer and costs nothing: kept in float32 in a bf16 model, as diffusers does."""


def keeps_fp32(name: str) -> bool:
    """Whether the parameter `name` stays float32 when the model is cast to a lower precision."""
    return any(part in name.split(".") for part in FP32_PARTS)


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Architecture of a Wan transformer; the defaults are Wan 2.1 T2V 1.3B."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    eps: float = 1e-6
    rope_theta: float = 10000.0
    prediction: str = "velocity"
    """What the last linear layer gives: "velocity" (Wan) or "x0" (easier in one step when a
    patch has nearly as many numbers as the network is wide). forward() returns a velocity."""

    def __post_init__(self) -> None:
        patch: tuple[int, ...] = self.patch_size  # a file may have given any number of values
        if len(patch) != 3 or patch[0] != 1 or min(patch) < 1:
            raise UserError(f"patch_size must be (1, h, w), got {self.patch_size}")
        for name in ("num_attention_heads", "in_channels", "out_channels", "text_dim", "freq_dim",
                     "ffn_dim", "num_layers"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.attention_head_dim < 6 or self.attention_head_dim % 2:
            raise UserError(
                f"attention_head_dim must be even and >= 6, got {self.attention_head_dim}"
            )
        if self.freq_dim % 2:
            raise UserError(f"freq_dim must be even, got {self.freq_dim}")
        if self.prediction not in ("velocity", "x0"):
            raise UserError(f'prediction must be "velocity" or "x0", got {self.prediction!r}')

    @property
    def width(self) -> int:
        """Residual width D."""
        return self.num_attention_heads * self.attention_head_dim


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """[cos | sin](t 10000^(-i / (dim / 2))), float32 [*, dim]; t in [0, 1000]."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[..., None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class _MLP(nn.Module):
    def __init__(self, d_in: int, d_hidden: int, activation: str) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(d_in, d_hidden)
        self.linear_2 = nn.Linear(d_hidden, d_hidden)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear_1(x)
        h = F.silu(h) if self.activation == "silu" else F.gelu(h, approximate="tanh")
        return self.linear_2(h)  # type: ignore[no-any-return]


class ConditionEmbedder(nn.Module):
    """Noise level -> (e [.., D], e0 [.., 6, D]) and text rows -> width."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = _MLP(config.freq_dim, config.width, "silu")
        self.time_proj = nn.Linear(config.width, 6 * config.width)
        self.text_embedder = _MLP(config.text_dim, config.width, "gelu_tanh")

    def time(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sigma [B] or [B, F] in [0, 1] -> e [B, F or 1, D], e0 [B, F or 1, 6, D]."""
        if sigma.dim() == 1:
            sigma = sigma[:, None]
        # Modulation steers every layer; it stays in the weights' own precision under autocast.
        with torch.autocast(sigma.device.type, enabled=False):
            weight = self.time_embedder.linear_1.weight
            e = self.time_embedder(timestep_embedding(sigma * 1000, self.freq_dim).to(weight.dtype))
            e0 = self.time_proj(F.silu(e).to(self.time_proj.weight.dtype)).unflatten(-1, (6, -1))
        return e.float(), e0.float()

    def text(self, text: torch.Tensor) -> torch.Tensor:
        """[..., S, text_dim] -> [..., S, D]."""
        return self.text_embedder(text)  # type: ignore[no-any-return]


def _rms(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """The norm in its weight's precision, rounded once at the end, as torch does it: but torch
    takes its fused kernel only if both are of one type, which under autocast they are not."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised q and k over the full width (Wan's qk-norm)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(d, d)
        self.to_k = nn.Linear(d, d)
        self.to_v = nn.Linear(d, d)
        self.to_out = nn.ModuleList([nn.Linear(d, d), nn.Identity()])
        self.norm_q = nn.RMSNorm(d, eps=config.eps)
        self.norm_k = nn.RMSNorm(d, eps=config.eps)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def key_value(self, x: torch.Tensor) -> KV:
        """K (normalised, not rotated) and V, each [..., N, D / N]."""
        v = self.to_v(x)
        return self.split(_rms(self.norm_k, self.to_k(x))), self.split(v)

    def query(self, x: torch.Tensor) -> torch.Tensor:
        return self.split(_rms(self.norm_q, self.to_q(x)))

    def out(self, x_BLND: torch.Tensor) -> torch.Tensor:
        return self.to_out[0](x_BLND.flatten(-2))  # type: ignore[no-any-return]


def attend(q_BLND: torch.Tensor, k_BLND: torch.Tensor, v_BLND: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, unmasked, heads in the third place."""
    out = F.scaled_dot_product_attention(
        q_BLND.transpose(1, 2), k_BLND.transpose(1, 2), v_BLND.transpose(1, 2)
    )
    return out.transpose(1, 2)


Table = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Batched:
    """Groups of a plan with the same sizes and positions (they share one attention call), and
    the RoPE tables of their queries and keys."""

    groups: tuple[Group, ...]
    query_table: Table
    key_table: Table


Wiring = tuple[Batched, ...]


def wire(plan: Plan, grid: tuple[int, int], config: WanConfig, device: torch.device) -> Wiring:
    """A plan made ready for a pass: done once per pass, outside the blocks."""
    rest = (*grid, config.attention_head_dim, config.rope_theta, device)
    alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Group]] = {}
    for g in plan:
        alike.setdefault((g.query_positions, g.key_positions), []).append(g)
    return tuple(
        Batched(tuple(groups), rope_table(q, *rest), rope_table(k, *rest))
        for (q, k), groups in alike.items()
    )


def planned_attention(
    q_BFLND: torch.Tensor,
    own: KV,
    past: KV | None,
    wiring: Wiring,
) -> torch.Tensor:
    """Self-attention along a plan; RoPE is applied here, to queries and keys at read."""
    k_own, v_own = own
    k_all = k_own if past is None else torch.cat([past[0].to(k_own.dtype), k_own], 1)
    v_all = v_own if past is None else torch.cat([past[1].to(v_own.dtype), v_own], 1)
    frames = q_BFLND.shape[1]
    pieces: list[tuple[tuple[int, ...], torch.Tensor]] = []
    for part in wiring:
        groups = part.groups
        q = torch.cat([frames_of(q_BFLND, g.queries) for g in groups])
        k = torch.cat([frames_of(k_all, g.keys) for g in groups])
        v = torch.cat([frames_of(v_all, g.keys) for g in groups])
        q, k = rotate(q, part.query_table), rotate(k, part.key_table)
        out = attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2))
        out = out.unflatten(1, (len(groups[0].queries), -1))
        pieces += zip([g.queries for g in groups], out.chunk(len(groups)), strict=True)
    if len(pieces) == 1 and pieces[0][0] == tuple(range(frames)):
        return pieces[0][1]
    pieces.sort(key=lambda p: p[0][0])  # by first frame; the compiler cannot sort by tuples
    order = [i for index, _ in pieces for i in index]
    if order != list(range(frames)):
        raise ValueError(f"the plan covers query frames {order}, the pass has {frames}")
    return torch.cat([p for _, p in pieces], 1)


class _GELU(nn.Module):
    """Linear then tanh-GELU, named as diffusers names it (`net.0.proj`)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_in, d_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_GELU(d, hidden), nn.Identity(), nn.Linear(hidden, d)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[2](self.net[0](x))  # type: ignore[no-any-return]


def _norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


class Block(nn.Module):
    """x += gate1 SA(mod1(LN x)); x += CA(LN x, text); x += gate2 FFN(mod2(LN x))."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.width
        self.eps = config.eps
        self.attn1 = Attention(config)
        self.attn2 = Attention(config)
        self.norm2 = nn.LayerNorm(d, eps=config.eps)
        self.ffn = FeedForward(d, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, d) / d**0.5)

    def modulation(self, e0: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Six tensors [B, F or 1, 1, D]: shift1, scale1, gate1, shift2, scale2, gate2."""
        return (self.scale_shift_table.float() + e0)[:, :, :, None].unbind(2)

    def forward(
        self,
        x_BFLD: torch.Tensor,
        e0: torch.Tensor,
        text: torch.Tensor,
        past: KV | None,
        wiring: Wiring,
        keys_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (x, K, V); K and V are this pass's own, K not rotated.

        keys_only: stop at K and V (x comes back as it was given), as the cache pass does last.
        """
        x = x_BFLD
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(e0)
        h = (_norm(x, self.eps) * (1 + scale1) + shift1).to(x.dtype)
        k, v = self.attn1.key_value(h)
        if keys_only:
            return x, k, v
        a = planned_attention(self.attn1.query(h), (k, v), past, wiring)
        x = (x.float() + self.attn1.out(a) * gate1).to(x.dtype)
        x = x + self.cross(x, text)
        h = (_norm(x, self.eps) * (1 + scale2) + shift2).to(x.dtype)
        x = (x.float() + self.ffn(h).float() * gate2).to(x.dtype)
        return x, k, v

    def cross(self, x_BFLD: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Text [B, S, D] for the whole pass, or [B, F, S, D], one prompt a frame."""
        weight = self.norm2.weight.float()
        bias = self.norm2.bias.float()
        h = F.layer_norm(x_BFLD.float(), x_BFLD.shape[-1:], weight, bias, self.eps)
        h = h.to(x_BFLD.dtype)
        per_frame_text = text.dim() == 4
        h = h.flatten(0, 1) if per_frame_text else h.flatten(1, 2)
        k, v = self.attn2.key_value(text.flatten(0, 1) if per_frame_text else text)
        out = self.attn2.out(attend(self.attn2.query(h), k, v))
        return out.view_as(x_BFLD)


class WanTransformer(nn.Module):
    """Wan 2.1 DiT; see the module's docstring. Built from a `WanConfig`."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        patch = config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, d, kernel_size=patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.proj_out = nn.Linear(d, config.out_channels * math.prod(patch))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, d) / d**0.5)

    @property
    def device(self) -> torch.device:
        return self.proj_out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    def cast(self, dtype: torch.dtype) -> WanTransformer:
        """Weights in `dtype`, in place, except those that `keeps_fp32` names; returns self."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if keeps_fp32(name) else dtype)
        return self

    # -- passes ---------------------------------------------------------------------------

    def forward(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        text: torch.Tensor,
        *,
        plan: Plan | None = None,
        past: Sequence[KV] | None = None,
    ) -> torch.Tensor:
        """Velocity of noisy latents.

        latents: [B, C, F, H, W]; H and W multiples of the patch size.
        sigma: [B], or [B, F] for one noise level per frame, in [0, 1].
        text: [B, S, text_dim], or [B, F, S, text_dim] for one prompt per frame.
        plan: who sees whom (default: bidirectional); past: per-layer K/V of earlier frames.
        Returns the velocity eps - x0, [B, C, F, H, W].
        """
        x, e, e0, context, grid = self._embed(latents, sigma, text)
        plan = plan or plans.bidirectional(latents.shape[2])
        wiring = wire(plan, grid, self.config, x.device)
        for i, block in enumerate(self.blocks):
            x, _, _ = block(x, e0, context, None if past is None else past[i], wiring)
        out = self._unpatch(self._head(x, e), grid).to(latents.dtype)
        if self.config.prediction == "x0":
            s = per_frame(sigma, latents).clamp_min(MIN_SIGMA)
            return (latents - out) / s
        return out

    def keys_values(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        text: torch.Tensor,
        *,
        plan: Plan | None = None,
        past: Sequence[KV] | None = None,
    ) -> tuple[KV, ...]:
        """The cache pass: K and V of every layer, and nothing after those of the last one."""
        x, _, e0, context, grid = self._embed(latents, sigma, text)
        plan = plan or plans.bidirectional(latents.shape[2])
        wiring = wire(plan, grid, self.config, x.device)
        out: list[KV] = []
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            x, k, v = block(x, e0, context, None if past is None else past[i], wiring, last)
            out.append((k, v))
        return tuple(out)

    def features(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        text: torch.Tensor,
        *,
        layers: Sequence[int],
        plan: Plan | None = None,
    ) -> list[torch.Tensor]:
        """Outputs of the blocks `layers` (0-based, ascending), each [B, F, L, D]."""
        x, _, e0, context, grid = self._embed(latents, sigma, text)
        plan = plan or plans.bidirectional(latents.shape[2])
        wiring = wire(plan, grid, self.config, x.device)
        out = []
        for i, block in enumerate(self.blocks[: max(layers) + 1]):
            x, _, _ = block(x, e0, context, None, wiring)
            if i in layers:
                out.append(x)
        return out

    def _embed(
        self, latents: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]:
        _, p, q = self.config.patch_size
        b, c, f, h, w = latents.shape
        if c != self.config.in_channels:
            raise UserError(f"latents have {c} channels, the model takes {self.config.in_channels}")
        if h % p or w % q:
            raise UserError(f"latents are {h}x{w}, not a multiple of the patch {p}x{q}")
        if sigma.shape not in ((b,), (b, f)):
            raise ValueError(f"sigma must be [{b}] or [{b}, {f}], got {list(sigma.shape)}")
        x = self.patch_embedding(latents.to(self.dtype)).flatten(3).permute(0, 2, 3, 1)
        if torch.is_autocast_enabled(latents.device.type):
            x = x.float()  # the residual stream keeps fp32 where weights are fp32 masters
        e, e0 = self.condition_embedder.time(sigma)
        context = self.condition_embedder.text(text.to(self.dtype))
        return x, e, e0, context, (h // p, w // q)

    def _head(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Tokens [B, F, L, D] -> the numbers of their patches [B, F, L, p q C]."""
        table = self.scale_shift_table.float() + e[:, :, None]
        shift, scale = table[:, :, :, None].unbind(2)
        h = (_norm(x, self.config.eps) * (1 + scale) + shift).to(x.dtype)
        return self.proj_out(h)  # type: ignore[no-any-return]

    def _unpatch(self, out: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, F, L, p q C] -> [B, C, F, H, W]."""
        _, p, q = self.config.patch_size
        out = out.unflatten(2, grid).unflatten(-1, (p, q, -1))  # B F h w p q C
        return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialisation for training from scratch.

        Xavier linears and a zero output layer; gates at 0.5 and qk-norms at 1.4 rather than near
        0 and at 1, so that attention by position is learnt in hundreds of updates on small grids.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1), generator=generator)
        nn.init.zeros_(self.patch_embedding.bias)  # type: ignore[arg-type]
        for mlp in (self.condition_embedder.time_embedder, self.condition_embedder.text_embedder):
            for linear in (mlp.linear_1, mlp.linear_2):
                nn.init.normal_(linear.weight, std=0.02, generator=generator)
        for block in self.blocks:
            assert isinstance(block, Block)
            out = block.attn2.to_out[0]
            assert isinstance(out, nn.Linear)
            nn.init.zeros_(out.weight)
            nn.init.constant_(block.attn1.norm_q.weight, 1.4)
            nn.init.constant_(block.attn1.norm_k.weight, 1.4)
            nn.init.zeros_(block.scale_shift_table)
            with torch.no_grad():
                block.scale_shift_table[:, [2, 5]] = 0.5
        nn.init.zeros_(self.scale_shift_table)
        # The noise level says nothing at first: each block learns what to do with it.
        nn.init.zeros_(self.condition_embedder.time_proj.weight)
        nn.init.zeros_(self.proj_out.weight)

    # -- files ----------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors, readable by diffusers."""
        from aad1.models.weights import save_transformer

        save_transformer(self, Path(folder), dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> WanTransformer:
        """Read a diffusers `WanTransformer3DModel` folder; UserError names what is wrong."""
        from aad1.models.weights import load_transformer

        return load_transformer(Path(folder), dtype, torch.device(device))
