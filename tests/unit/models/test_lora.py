"""LoRAs: each form merges to the same weights, as written out in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aad1.errors import UserError
from aad1.models.checkpoints import find_parts, load_wan_transformer
from aad1.models.lora import read_lora
from wan_files import State, original_transformer

# Original name, diffusers' name, (out, in) of the tiny transformer.
LAYERS = [
    ("blocks.0.self_attn.q", "blocks.0.attn1.to_q", (256, 256)),
    ("blocks.1.self_attn.o", "blocks.1.attn1.to_out.0", (256, 256)),
    ("blocks.1.cross_attn.v", "blocks.1.attn2.to_v", (256, 256)),
    ("blocks.0.ffn.0", "blocks.0.ffn.net.0.proj", (64, 256)),
    ("blocks.1.ffn.2", "blocks.1.ffn.net.2", (256, 64)),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2", (256, 256)),
    ("time_projection.1", "condition_embedder.time_proj", (1536, 256)),
    ("head.head", "proj_out", (64, 256)),
]
RANK, ALPHA = 4, 2.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file(original_transformer(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def factors() -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    return {
        name: (torch.randn(RANK, inner), torch.randn(out, RANK)) for name, _, (out, inner) in LAYERS
    }


def peft(alpha: float) -> State:
    """diffusers' form has no alpha of its own here: it is in the factors."""
    out = {}
    for name, theirs, _ in LAYERS:
        down, up = factors()[name]
        out[f"transformer.{theirs}.lora_A.weight"] = down * (alpha / RANK)
        out[f"transformer.{theirs}.lora_B.weight"] = up
    return out


def comfyui() -> State:
    out = {}
    for name, _, _ in LAYERS:
        down, up = factors()[name]
        out[f"diffusion_model.{name}.lora_down.weight"] = down
        out[f"diffusion_model.{name}.lora_up.weight"] = up
        out[f"diffusion_model.{name}.alpha"] = torch.tensor(ALPHA)
    return out


def kohya() -> State:
    return {
        "lora_unet_" + head.replace("diffusion_model.", "").replace(".", "_") + f".{tail}": value
        for key, value in comfyui().items()
        for head, tail in [key.split(".lora", 1) if ".lora" in key else key.rsplit(".", 1)]
        for tail in ["lora" + tail if tail.startswith("_") else tail]
    }


def merged(scale: float) -> State:
    """By the definition, in float64: W + scale (alpha / r) B A."""
    state = original_transformer()
    for name, _, _ in LAYERS:
        down, up = (t.double() for t in factors()[name])
        weight = state[f"{name}.weight"].double() + scale * ALPHA / RANK * up @ down
        state[f"{name}.weight"] = weight.float()
    return state


def weights(path: Path, *loras: tuple[Path, float], dtype: torch.dtype | None = None) -> State:
    return load_wan_transformer(path, dtype, loras=loras).state_dict()


def check(got: State, want: State, tmp_path: Path) -> None:
    path = tmp_path / "want.safetensors"
    save_file(want, path)
    plain = weights(path)
    assert got.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("form", [lambda: peft(ALPHA), comfyui, kohya])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_each_form_merges_to_the_definition(
    form: Callable[[], State], scale: float, model: Path, tmp_path: Path
) -> None:
    assert "lora_unet_blocks_0_self_attn_q.lora_up.weight" in kohya()
    save_file(form(), tmp_path / "lora.safetensors")
    got = weights(model, (tmp_path / "lora.safetensors", scale))
    check(got, merged(scale), tmp_path)
    untouched = weights(model)["blocks.0.attn1.to_k.weight"]
    assert torch.equal(got["blocks.0.attn1.to_k.weight"], untouched)


def test_the_forms_merge_to_the_same_weights(model: Path, tmp_path: Path) -> None:
    states = []
    for name, form in (("a", peft(ALPHA)), ("b", comfyui())):
        save_file(form, tmp_path / f"{name}.safetensors")
        states.append(weights(model, (tmp_path / f"{name}.safetensors", 0.7)))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-6, rtol=1e-6, msg=name)


def test_comfyui_names_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    form = comfyui()
    for name in ("text_embedding.2", "time_projection.1", "head.head"):
        del form[f"diffusion_model.{name}.alpha"]  # diffusers takes no alpha there
    form["diffusion_model.blocks.0.self_attn.q.diff_b"] = torch.randn(256)
    save_file(form, tmp_path / "a.safetensors")
    theirs = utils._convert_non_diffusers_wan_lora_to_diffusers(dict(form))
    bias = theirs.pop("transformer.blocks.0.attn1.to_q.lora_B.bias")
    save_file({k: v.contiguous() for k, v in theirs.items()}, tmp_path / "b.safetensors")
    save_file(original_transformer(), tmp_path / "model.safetensors")
    ours = weights(tmp_path / "model.safetensors", (tmp_path / "a.safetensors", 1.0))
    other = weights(tmp_path / "model.safetensors", (tmp_path / "b.safetensors", 1.0))
    other["blocks.0.attn1.to_q.bias"] += bias
    for name, value in other.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_adapters_of_a_training_run_are_read(model: Path, tmp_path: Path) -> None:
    """As LongLive publishes them: a .pt with `generator_lora`, names of PEFT inside FSDP."""
    state = {
        f"base_model.model.model._fsdp_wrapped_module.{name}.lora_{side}.weight": tensor
        for name, _, _ in LAYERS
        for side, tensor in zip("AB", factors()[name], strict=True)
    }
    other = {name: -value for name, value in state.items()}
    torch.save({"critic_lora": other, "generator_lora": state, "step": 3}, tmp_path / "lora.pt")
    got = weights(model, (tmp_path / "lora.pt", ALPHA / RANK))  # alpha / r is 1 in the file
    check(got, merged(1.0), tmp_path)


def test_whole_differences_of_weights_biases_norms_and_modulation(
    model: Path, tmp_path: Path
) -> None:
    form, want = {}, original_transformer()
    for key, suffix in (
        ("blocks.0.self_attn.q.weight", "diff"), ("blocks.0.self_attn.q.bias", "diff_b"),
        ("blocks.1.cross_attn.norm_k.weight", "diff"), ("blocks.1.norm3.bias", "diff_b"),
        ("patch_embedding.weight", "diff"), ("blocks.1.modulation", "diff"),
        ("head.modulation", "diff_m"), ("blocks.0.modulation", "diff_m"),
    ):  # fmt: skip
        layer = key.removesuffix(".weight").removesuffix(".bias")
        if suffix == "diff_m":  # LightX2V names the block, not its modulation
            layer = layer.removesuffix(".modulation")
        change = torch.randn_like(want[key])
        form[f"diffusion_model.{layer}.{suffix}"] = change
        want[key] = want[key] + 0.5 * change
    save_file(form, tmp_path / "lora.safetensors")
    check(weights(model, (tmp_path / "lora.safetensors", 0.5)), want, tmp_path)


def test_a_convolution_and_several_loras_in_order(model: Path, tmp_path: Path) -> None:
    want = original_transformer()
    down, up = torch.randn(3, 16, 1, 2, 2), torch.randn(256, 3, 1, 1, 1)
    form = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    save_file(form, tmp_path / "a.safetensors")
    extra = torch.randn(256)
    save_file({"patch_embedding.diff_b": extra}, tmp_path / "b.safetensors")
    delta = torch.einsum("or,rixyz->oixyz", up[:, :, 0, 0, 0], down)
    want["patch_embedding.weight"] += 2 * delta + delta
    want["patch_embedding.bias"] += extra
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    check(weights(model, (a, 2.0), (b, 1.0), (a, 1.0)), want, tmp_path)


@pytest.mark.parametrize("where", ["folder", "metadata", "file"])
@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_of_peft(model: Path, tmp_path: Path, where: str, rslora: bool) -> None:
    settings = {"r": RANK, "lora_alpha": 8, "use_rslora": rslora}
    settings["alpha_pattern"] = {"to_v": 1}
    form = {k.replace(".weight", ".default.weight"): v for k, v in peft(RANK).items()}
    folder = tmp_path / "lora"
    folder.mkdir()
    path = folder / "adapter_model.safetensors"
    if where == "metadata":
        stored = {f"transformer.{key}": value for key, value in settings.items()}
        save_file(form, path, {"lora_adapter_metadata": json.dumps(stored)})
    else:
        save_file(form, path)
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    got = weights(model, (folder if where == "folder" else path, 1.0))
    want = original_transformer()
    for name, _, _ in LAYERS:
        down, up = factors()[name]
        alpha = 1 if name.endswith("v") else 8
        want[f"{name}.weight"] += alpha / (math.sqrt(RANK) if rslora else RANK) * up @ down
    check(got, want, tmp_path)


def test_bf16_is_rounded_once_after_merging(model: Path, tmp_path: Path) -> None:
    save_file(comfyui(), tmp_path / "lora.safetensors")
    got = weights(model, (tmp_path / "lora.safetensors", 1.0), dtype=torch.bfloat16)
    want = merged(1.0)["blocks.0.self_attn.q.weight"].bfloat16()
    assert (got["blocks.0.attn1.to_q.weight"] != want).float().mean() < 1e-3


@pytest.mark.parametrize(
    "change,words",
    [
        ({"blocks.9.self_attn.q.diff": torch.zeros(256, 256)}, "1 layers that"),
        ({"blocks.0.self_attn.q.diff": torch.zeros(128, 128)}, "another size"),
        ({"blocks.0.self_attn.q.diff_b": torch.zeros(64)}, "another size"),
        ({"blocks.0.self_attn.norm_q.diff_b": torch.zeros(256)}, "the model has no"),
        ({"blocks.0.ffn.0.lora_down.weight": torch.zeros(4, 256)}, "pair is incomplete"),
        ({"blocks.0.ffn.0.hada_w1_a": torch.zeros(4, 4)}, "hada_w1_a"),
        ({"blocks.0.ffn.0.dora_scale": torch.zeros(4, 4)}, "dora_scale"),
        (
            {"blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 128),
             "blocks.0.ffn.0.lora_B.weight": torch.zeros(64, 4)}, "another size",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_told(
    model: Path, tmp_path: Path, change: State, words: str
) -> None:
    save_file(change, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=words) as error:
        weights(model, (tmp_path / "lora.safetensors", 1.0))
    assert "lora.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_lora_is_no_model_and_a_model_no_lora(model: Path, tmp_path: Path) -> None:
    save_file(comfyui(), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="is a LoRA, not a model"):
        find_parts(tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="no LoRA that can be merged"):
        read_lora(model)
    with pytest.raises(UserError, match="finite"):
        weights(model, (tmp_path / "lora.safetensors", math.nan))
    with pytest.raises(UserError, match="must hold one LoRA file, it has 2"):
        read_lora(tmp_path)
