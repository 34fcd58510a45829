"""The configuration of Wan's networks: what shapes tell, and a config.json where there is one.

Names are those of diffusers and transformers (`aad1.models.wan_keys`). Variants that are not
supported are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from aad1.errors import UserError
from aad1.models.dit import WanConfig
from aad1.models.tensor_files import Source, Spec
from aad1.models.weights import read_transformer_config

HEAD_DIM = 128
"""Width of a head in every Wan transformer; shapes do not tell it."""
UMT5_WIDTH = 4096
_SIZES = {(1536, 8960): ("1.3B", 30), (5120, 13824): ("14B", 40)}

# What marks a variant that this network is not, and how to call it.
_VARIANTS = (
    (r"scaled_fp8|scale_weight|comfy_quant|weight_scale", "fp8-scaled weights (take bf16 or fp16)"),
    (r"vace_", "VACE"),
    (r"face_adapter|motion_encoder|pose_patch_embedding", "Wan Animate"),
    (r"audio_injector|casual_audio_encoder|audio_proj", "Wan sound-to-video"),
    (r"control_adapter|ref_conv|cam_|camera", "a Wan model with control or camera inputs"),
    (
        r"img_emb\.|k_img|image_embedder|add_k_proj",
        "Wan image-to-video with a CLIP image branch (the T2V weights are what is distilled)",
    ),
)
CHANNELS = {36: "Wan 2.2 image-to-video (36 input channels)", 48: "Wan 2.2 5B (48 channels)"}


def size_name(width: int, ffn: int) -> str:
    """ "1.3B", "14B" or "width 24"."""
    return _SIZES.get((width, ffn), (f"width {width}", 0))[0]


def check_variant(source: Source) -> None:
    """UserError that names the variant if these are weights of a Wan that is not supported."""
    for pattern, what in _VARIANTS:
        found = next((n for n in source.places if re.search(pattern, n)), None)
        if found:
            raise UserError(f"{source.where} holds {what}, which is not supported (it has {found})")
    patch = source.specs.get("patch_embedding.weight")
    text = source.specs.get("condition_embedder.text_embedder.linear_1.weight")
    if patch is None or text is None or len(patch.shape) != 5:
        return
    # Networks for small worlds may have as many channels; UMT5's width is what makes it a Wan.
    if text.shape[1] == UMT5_WIDTH and patch.shape[1] in CHANNELS:
        what = CHANNELS[patch.shape[1]]
        raise UserError(f"{source.where} holds {what}, which is not supported")


def check_one_model(source: Source) -> None:
    """UserError if the files of a transformer are of different widths (mixed-up shards)."""
    widths: dict[int, str] = {}
    for name, (file, key) in source.places.items():
        if name.endswith(("norm_q.weight", "norm2.weight", "patch_embedding.bias")):
            widths.setdefault(file.specs[key].shape[0], str(file.path))
    if len(widths) > 1:
        known = {width: name for (width, _), (name, _) in _SIZES.items()}
        some = "; ".join(
            f"{file} is of width {width}" + (f" ({known[width]})" if width in known else "")
            for width, file in sorted(widths.items())
        )
        raise UserError(f"{source.where} mixes parts of different models: {some}")


def check_width(source: Source, width: int) -> None:
    """UserError if the weights are of another width than a config.json beside them says."""
    patch = source.specs.get("patch_embedding.bias")
    if patch is not None and patch.shape[0] != width:
        known = {width: f" ({name})" for (width, _), (name, _) in _SIZES.items()}
        own = patch.shape[0]
        raise UserError(
            f"{source.where} mixes parts of different models: its weights are of width "
            f"{own}{known.get(own, '')}, its config.json says {width}{known.get(width, '')}"
        )


def wan_config(source: Source) -> WanConfig:
    """The configuration of a transformer, from diffusers' config.json if there is one."""
    if source.config.get("_class_name") == "WanTransformer3DModel":
        check_one_model(source)
        folder = source.where if source.where.is_dir() else source.where.parent
        config = read_transformer_config(source.config, folder / "config.json")
        check_variant(source)
        check_width(source, config.width)
        return config
    return transformer_config(source)


def transformer_config(source: Source) -> WanConfig:
    """The configuration of a Wan transformer from its shapes, and the head count from `config`.

    UserError for a variant that is not supported, mixed-up or missing parts, or a width that no
    number of heads is known for.
    """
    check_variant(source)
    check_one_model(source)
    specs = source.specs

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        if name not in specs:
            raise UserError(f"{source.where} is incomplete: it has no {name}{source.reasons}")
        found = specs[name].shape
        if len(found) != dimensions:
            raise UserError(f"{source.where}: {name} is {list(found)}, no weight of a Wan model")
        return found

    patch = shape("patch_embedding.weight", 5)
    width, ffn = patch[0], shape("blocks.0.ffn.net.0.proj.weight")[0]
    layers = 1 + max(_indices(r"^blocks\.(\d+)\.", specs), default=-1)
    # A config.json that happens to lie beside a single file may be of another model.
    config = source.config if source.config.get("dim", width) == width else {}
    stated = config.get("num_layers")
    name, known = _SIZES.get((width, ffn), ("", 0))
    wanted = stated if isinstance(stated, int) else known
    if layers < wanted:
        raise UserError(
            f"{source.where} is incomplete: it has {layers} of {wanted} blocks"
            + (f" of Wan {name}" if name else "")
            + source.reasons
        )
    heads = config.get("num_attention_heads", config.get("num_heads"))
    if not isinstance(heads, int) or heads < 1 or width % heads:
        if width % HEAD_DIM:
            raise UserError(
                f"{source.where} is of width {width}, no multiple of {HEAD_DIM}: a config.json "
                "beside it must give num_heads"
            )
        heads = width // HEAD_DIM
    out = shape("proj_out.weight")[0]
    return WanConfig(
        patch_size=(patch[2], patch[3], patch[4]),
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=patch[1],
        out_channels=out // (patch[2] * patch[3] * patch[4]),
        text_dim=shape("condition_embedder.text_embedder.linear_1.weight")[1],
        freq_dim=shape("condition_embedder.time_embedder.linear_1.weight")[1],
        ffn_dim=ffn,
        num_layers=layers,
        eps=float(config.get("eps", WanConfig.eps)),
    )


def vae_json(source: Source) -> dict[str, Any]:
    """Arguments of diffusers' `AutoencoderKLWan`: config.json if it has them, else from shapes."""
    shapes = vae_config(source)
    if source.config.get("_class_name") != "AutoencoderKLWan":
        return shapes
    return {k: v for k, v in source.config.items() if not k.startswith("_")}


def vae_config(source: Source) -> dict[str, Any]:
    """Arguments of diffusers' `AutoencoderKLWan` from shapes; mean and std are its own, Wan 2.1's.

    UserError for Wan 2.2's autoencoder, another number of channels than Wan's 16, or missing parts.
    """
    specs = source.specs
    try:
        z = specs["post_quant_conv.weight"].shape[0]
        base, pixels = specs["encoder.conv_in.weight"].shape[:2]
        out, last = specs["decoder.conv_out.weight"].shape[:2]
    except KeyError as error:
        raise UserError(
            f"{source.where} is incomplete: the VAE has no {error}{source.reasons}"
        ) from None
    if z == 48 or any(re.search(r"downsamples\.\d+\.downsamples", name) for name in specs):
        raise UserError(f"{source.where} holds Wan 2.2's VAE, which is not supported")
    if z != 16:
        raise UserError(f"{source.where}: a Wan VAE has 16 latent channels, this one has {z}")
    widths: list[list[int]] = [[]]  # of the residual blocks, by stage
    temporal: list[bool] = []
    for i in sorted(set(_indices(r"^encoder\.down_blocks\.(\d+)\.", specs))):
        block = f"encoder.down_blocks.{i}"
        if f"{block}.resample.1.weight" in specs:
            temporal.append(f"{block}.time_conv.weight" in specs)
            widths.append([])
        elif f"{block}.conv1.weight" in specs:
            widths[-1].append(specs[f"{block}.conv1.weight"].shape[0])
    if not all(widths):
        raise UserError(
            f"{source.where} is incomplete: the VAE's encoder lacks blocks{source.reasons}"
        )
    return dict(
        base_dim=base,
        decoder_base_dim=None if last == base else last,
        z_dim=z,
        dim_mult=[stage[0] // base for stage in widths],
        num_res_blocks=len(widths[0]),
        temperal_downsample=temporal,
        in_channels=pixels,
        out_channels=out,
    )


def umt5_json(source: Source) -> dict[str, Any]:
    """Arguments of transformers' `UMT5Config`: config.json's, with what shapes tell on top."""
    check_variant(source)
    own = source.config if source.config.get("model_type") == "umt5" else {}
    return {**own, **umt5_config(source)}


def umt5_config(source: Source) -> dict[str, Any]:
    """Arguments of transformers' `UMT5Config` from shapes; the rest is UMT5's own."""
    specs = source.specs
    layer = "encoder.block.0.layer."
    try:
        vocabulary, width = specs["shared.weight"].shape
        buckets, heads = specs[f"{layer}0.SelfAttention.relative_attention_bias.weight"].shape
        inner = specs[f"{layer}0.SelfAttention.q.weight"].shape[0]
        ffn = specs[f"{layer}1.DenseReluDense.wi_0.weight"].shape[0]
    except KeyError as error:
        raise UserError(
            f"{source.where} is incomplete: the text encoder has no {error}{source.reasons}"
        ) from None
    return dict(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=ffn,
        num_layers=1 + max(_indices(r"^encoder\.block\.(\d+)\.", specs)),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
    )


def _indices(pattern: str, names: Iterable[str] | Mapping[str, Spec]) -> list[int]:
    return [int(found[1]) for found in (re.match(pattern, name) for name in names) if found]
