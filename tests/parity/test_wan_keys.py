"""The key maps, judged by others' code: diffusers' converters, and a plain UMT5 encoder."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aad1.models import wan_keys
from aad1.models.checkpoints import find_part, find_parts
from aad1.models.wan_codec import load_wan_vae
from aad1.models.wan_shapes import vae_config, wan_config
from aad1.models.weights import load_module
from wan_files import (
    State,
    original_transformer,
    original_umt5,
    original_vae,
    read_umt5,
    write_original,
)

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers.loaders.single_file_utils import (  # noqa: E402
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)


def same(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_transformer_and_vae_equal_diffusers_conversion(tmp_path: Path) -> None:
    write_original(tmp_path)
    parts = find_parts(tmp_path)
    same(
        dict(parts.source("transformer").read()),
        convert_wan_transformer_to_diffusers(original_transformer()),
    )
    same(dict(parts.source("vae").read()), convert_wan_vae_to_diffusers(original_vae()))


def test_original_names_come_back() -> None:
    state = original_transformer()
    ours = [wan_keys.dit_from_original(name) for name in state]
    assert len(set(ours)) == len(state) and None not in ours
    assert [wan_keys.dit_to_original(str(name)) for name in ours] == list(state)
    for blocks in (1, 2, 3):
        vae = original_vae(blocks=blocks)
        names = [str(wan_keys.vae_from_original(vae)(name)) for name in vae]
        assert len(set(names)) == len(vae)
        assert [wan_keys.vae_to_original(names)(name) for name in names] == list(vae)
    text = original_umt5()
    names = [str(wan_keys.umt5_from_original(name)) for name in text]
    assert [wan_keys.umt5_to_original(name) for name in names] == list(text)


@pytest.mark.parametrize(
    "rename,name",
    [
        (wan_keys.dit_from_original, "blocks.0.norm2.weight"),  # Wan's norm2 has no weights
        (wan_keys.dit_from_original, "blocks.0.cross_attn.k_img.weight"),
        (wan_keys.dit_to_original, "blocks.0.attn1.add_k_proj.weight"),
        (wan_keys.umt5_from_original, "blocks.0.ffn.fc3.weight"),
        (wan_keys.vae_from_original([]), "encoder.downsamples.0.residual.1.weight"),
    ],
)
def test_a_name_of_no_such_network_has_no_other(rename: wan_keys.Rename, name: str) -> None:
    assert rename(name) is None


def test_all_names_of_the_published_vae_are_known() -> None:
    with torch.device("meta"):
        names = list(diffusers.AutoencoderKLWan().state_dict())
    to = wan_keys.vae_to_original(names)
    original = [str(to(name)) for name in names]
    back = wan_keys.vae_from_original(original)
    assert [back(name) for name in original] == names
    theirs = convert_wan_vae_to_diffusers({name: name for name in original})
    assert theirs == dict(zip(names, original, strict=True))


@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "model.diffusion_model.", "diffusion_model.", "model._fsdp_wrapped_module.",
     "_fsdp_wrapped_module.model._fsdp_wrapped_module."],
)  # fmt: skip
def test_prefixes_are_stripped(prefix: str) -> None:
    name = "blocks.3.self_attn.q.weight"
    assert wan_keys.strip_prefixes(prefix + name) == name
    inside = name.replace("blocks.3.", "blocks.3._checkpoint_wrapped_module.")
    assert wan_keys.strip_prefixes(prefix + inside) == name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_res_blocks=1),
        dict(dim_mult=[1, 2, 2], temperal_downsample=[True, False]),
        dict(decoder_base_dim=12),
    ],
)
def test_vae_config_from_shapes_equals_diffusers(tmp_path: Path, changes: dict) -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(**(dict(base_dim=8) | changes))
    vae.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    config = vae_config(find_parts(tmp_path).source("vae"))
    assert config == {name: vae.config[name] for name in config}
    assert {"base_dim", "dim_mult", "num_res_blocks", "temperal_downsample"} <= config.keys()
    clip = torch.randint(0, 256, (1, 5, 16, 16, 3), dtype=torch.uint8)
    loaded = load_wan_vae(tmp_path)
    theirs = vae.encode(clip.permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(loaded.vae.config.latents_mean, vae.config.latents_mean)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(loaded.encode(clip), (theirs - mean) / std, atol=1e-5, rtol=1e-5)


def test_transformer_config_from_shapes(tmp_path: Path) -> None:
    write_original(tmp_path)
    with_config = wan_config(find_parts(tmp_path).source("transformer"))
    (tmp_path / "config.json").unlink()
    config = wan_config(find_parts(tmp_path).source("transformer"))
    assert config == with_config
    assert (config.num_attention_heads, config.attention_head_dim) == (2, 128)
    assert (config.num_layers, config.ffn_dim, config.text_dim, config.freq_dim) == (2, 64, 16, 32)


# ---- UMT5: the original encoder, written out ----------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def bucket(distance: int) -> int:
    """Of 32: the upper 16 for keys behind the query; 8 exact ones, 8 spaced in log up to 128."""
    start, distance = (16, distance) if distance > 0 else (0, -distance)
    if distance < 8:
        return start + distance
    return start + min(15, 8 + int(math.log(distance / 8) / math.log(128 / 8) * 8))


def plain_umt5(state: State, ids: Tensor, heads: int) -> Tensor:
    """[L] ids -> [L, D], in float64, with the original names."""
    state = {name: value.double() for name, value in state.items()}
    x = state["token_embedding.weight"][ids]
    length = len(ids)
    where = torch.tensor([[bucket(k - q) for k in range(length)] for q in range(length)])
    for i in range(1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d+)").match, state) if m)):
        w = {n.removeprefix(f"blocks.{i}."): t for n, t in state.items() if f"blocks.{i}." in n}
        h = rms_norm(x, w["norm1.weight"])
        q, k, v = ((h @ w[f"attn.{p}.weight"].T).unflatten(1, (heads, -1)) for p in "qkv")
        scores = torch.einsum("qnc,knc->nqk", q, k)  # T5 does not scale
        scores = scores + w["pos_embedding.embedding.weight"][where].permute(2, 0, 1)
        h = torch.einsum("nqk,knc->qnc", scores.softmax(-1), v).flatten(1)
        x = x + h @ w["attn.o.weight"].T
        h = rms_norm(x, w["norm2.weight"])
        gate = F.gelu(h @ w["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (h @ w["ffn.fc1.weight"].T)) @ w["ffn.fc2.weight"].T
    return rms_norm(x, state["norm.weight"])


@torch.no_grad()
def test_umt5_equals_a_plain_encoder_with_the_original_names(tmp_path: Path) -> None:
    state = original_umt5()
    torch.save(state, tmp_path / "t5.pth")
    config, ours = read_umt5(tmp_path / "t5.pth")
    assert (config["num_heads"], config["d_kv"], config["num_layers"]) == (2, 12, 2)
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**config)).eval()
    model.load_state_dict(ours, strict=True)
    ids = torch.randint(0, 64, (150,))  # longer than the 128 where distances stop to count
    got = model.double()(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(got, plain_umt5(state, ids, 2), atol=1e-5, rtol=1e-4)
    swapped = state | {"blocks.1.ffn.fc1.weight": state["blocks.1.ffn.gate.0.weight"]}
    swapped["blocks.1.ffn.gate.0.weight"] = state["blocks.1.ffn.fc1.weight"]
    assert (plain_umt5(swapped, ids, 2) - got).abs().max() > 1e-2


@torch.no_grad()
def test_umt5_is_filled_on_the_meta_device(tmp_path: Path) -> None:
    torch.save(original_umt5(), tmp_path / "t5.pth")
    config, state = read_umt5(tmp_path / "t5.pth")
    whole = transformers.UMT5EncoderModel(transformers.UMT5Config(**config)).eval()
    whole.load_state_dict(state)
    with torch.device("meta"):
        lazy = transformers.UMT5EncoderModel(transformers.UMT5Config(**config)).eval()
    load_module(lazy, find_part(tmp_path / "t5.pth", "text_encoder"))
    assert lazy.shared.weight is lazy.encoder.embed_tokens.weight
    ids = torch.randint(0, 64, (2, 9))
    got, want = (m(ids).last_hidden_state for m in (lazy, whole))
    assert torch.equal(got, want)


def test_transformers_folders_of_umt5_give_the_same_state(tmp_path: Path) -> None:
    torch.save(original_umt5(), tmp_path / "t5.pth")
    config, ours = read_umt5(tmp_path / "t5.pth")
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**config))
    model.load_state_dict(ours)
    model.save_pretrained(tmp_path / "folder", max_shard_size="20KB")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    again_config, again = read_umt5(tmp_path / "folder")
    assert {name: again_config[name] for name in config} == config
    same(again, dict(model.state_dict()))
