"""Names of Wan 2.1's weights: the original ones and those of diffusers and transformers.

Three networks, each with two sets of names for the same tensors, which are mapped without touching
a number: the transformer and the video autoencoder (diffusers), and the UMT5 encoder
(transformers). Names here are those of diffusers and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

Rename = Callable[[str], str | None]
"""A name in the other set, or None for one that is no name of this network."""

_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
_PREFIX = re.compile(r"^(model\.diffusion_model\.|diffusion_model\.|model\.|module\.)")


def strip_prefixes(name: str) -> str:
    """A name without what wrappers (FSDP, compile) and containers (`model.`, ComfyUI) put on it."""
    name = _WRAPPERS.sub("", name)
    while (found := _PREFIX.match(name)) is not None:
        name = name[found.end() :]
    return name


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


# ---- transformer --------------------------------------------------------------------------------

_DIT = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_DIT_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",  # the only norm of a block with weights: that before cross-attention
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{old}_attn.{theirs}": f"attn{number}.{ours}"
        for number, old in ((1, "self"), (2, "cross"))
        for theirs, ours in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"),
            ("norm_q", "norm_q"), ("norm_k", "norm_k"),
        )
    },
}  # fmt: skip
_PARAMETER = re.compile(r"^(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?$")


def _by_table(outer: Mapping[str, str], inner: Mapping[str, str]) -> Rename:
    def rename(name: str) -> str | None:
        found = _PARAMETER.match(name)
        if found is None:
            return None
        block, stem, leaf = found.group(1, 2, 3)
        new = (inner if block else outer).get(stem)
        return None if new is None else f"{block or ''}{new}{leaf or ''}"

    return rename


dit_from_original: Rename = _by_table(_DIT, _DIT_BLOCK)
dit_to_original: Rename = _by_table(_inverse(_DIT), _inverse(_DIT_BLOCK))

# ---- UMT5 encoder -------------------------------------------------------------------------------

_UMT5 = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}
_UMT5_BLOCK = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def umt5_from_original(name: str) -> str | None:
    """An original name -> transformers' `UMT5EncoderModel`."""
    found = re.match(r"^blocks\.(\d+)\.(.+)\.weight$", name)
    if found is None:
        return _UMT5.get(name)
    new = _UMT5_BLOCK.get(found[2])
    return None if new is None else f"encoder.block.{found[1]}.{new}.weight"


def umt5_to_original(name: str) -> str | None:
    """The inverse of `umt5_from_original`."""
    found = re.match(r"^encoder\.block\.(\d+)\.(.+)\.weight$", name)
    if found is None:
        return _inverse(_UMT5).get(name)
    new = _inverse(_UMT5_BLOCK).get(found[2])
    return None if new is None else f"blocks.{found[1]}.{new}.weight"


# ---- video autoencoder --------------------------------------------------------------------------

_VAE = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{side}.{old}": f"{side}.{new}"
        for side in ("encoder", "decoder")
        for old, new in (
            ("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"),
            ("middle.0", "mid_block.resnets.0"), ("middle.1", "mid_block.attentions.0"),
            ("middle.2", "mid_block.resnets.1"),
        )
    },
}  # fmt: skip
_VAE_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_SAME = {part: part for part in ("resample.1", "time_conv", "norm", "to_qkv", "proj", "")}


def _vae_stem(stem: str, blocks: Mapping[str, str], inner: Mapping[str, str]) -> str | None:
    for old, new in blocks.items():
        if stem == old or stem.startswith(f"{old}."):
            rest = inner.get(stem[len(old) + 1 :])
            return None if rest is None else f"{new}.{rest}".rstrip(".")
    return None


def vae_from_original(names: Iterable[str]) -> Rename:
    """The renaming for an autoencoder with these original names.

    The original decoder counts residual blocks and upsamplers in one row, and diffusers nests them
    in stages, so the length of a stage is needed: it is where the first upsampler stands.
    """
    found = [re.match(r"decoder\.upsamples\.(\d+)\.resample\.", name) for name in names]
    stage = min((int(m[1]) + 1 for m in found if m), default=1 << 30)
    inner = _VAE_RESIDUAL | _SAME

    def rename(name: str) -> str | None:
        stem, _, leaf = name.rpartition(".")
        row = re.match(r"(encoder\.down|decoder\.up)samples\.(\d+)\.(.+)$", stem)
        if row is None:
            new = _vae_stem(stem, _VAE, inner)
            return None if new is None else f"{new}.{leaf}"
        rest = inner.get(row[3])
        if rest is None:
            return None
        if row[1] == "encoder.down":
            return f"encoder.down_blocks.{row[2]}.{rest}.{leaf}"
        number, place = divmod(int(row[2]), stage)
        kind = "upsamplers.0" if place == stage - 1 else f"resnets.{place}"
        return f"decoder.up_blocks.{number}.{kind}.{rest}.{leaf}"

    return rename


def vae_to_original(names: Iterable[str]) -> Rename:
    """The inverse of `vae_from_original`, for an autoencoder with these names of diffusers."""
    found = [re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.", name) for name in names]
    stage = max((int(m[1]) + 2 for m in found if m), default=1)
    blocks, inner = _inverse(_VAE), _inverse(_VAE_RESIDUAL) | _SAME

    def rename(name: str) -> str | None:
        stem, _, leaf = name.rpartition(".")
        row = re.match(
            r"encoder\.down_blocks\.(\d+)\.(.+)$|"
            r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|(upsamplers)\.0)\.(.+)$",
            stem,
        )
        if row is None:
            new = _vae_stem(stem, blocks, inner)
            return None if new is None else f"{new}.{leaf}"
        rest = inner.get(row[2] or row[6])
        if rest is None:
            return None
        if row[1] is not None:
            return f"encoder.downsamples.{row[1]}.{rest}.{leaf}"
        place = stage - 1 if row[5] else int(row[4])
        return f"decoder.upsamples.{int(row[3]) * stage + place}.{rest}.{leaf}"

    return rename
