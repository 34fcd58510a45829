"""`aad1 convert`: there and back through every format, read by the formats' own programs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aad1.cli import main
from aad1.convert import FORMATS, convert
from aad1.errors import UserError
from aad1.model_info import read_info, write_info
from aad1.model_names import PACKAGED
from aad1.models.checkpoints import find_parts, load_wan_transformer
from aad1.pipeline import Pipeline
from wan_files import (
    original_config,
    original_transformer,
    original_umt5,
    original_vae,
    write_original,
)

NAMES = {"self-forcing": "x.pt", "comfyui": "x.safetensors"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    write_original(folder)
    return folder


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_comes_back_as_it_was(original: Path, tmp_path: Path, to: str) -> None:
    first = tmp_path / NAMES.get(to, "first")
    written = convert(original, first, to, shard_bytes=500_000)
    assert set(written) <= {"transformer", "vae", "text_encoder", "tokenizer"}
    assert ("vae" in written) is (to not in NAMES)
    convert(first, tmp_path / "back", "original", base=original)
    back = tmp_path / "back"
    got = load_file(back / "diffusion_pytorch_model.safetensors")
    for name, value in original_transformer().items():
        assert torch.equal(got.pop(name), value), name
    assert not got
    for file, state in (
        ("Wan2.1_VAE.pth", original_vae()),
        ("models_t5_umt5-xxl-enc-bf16.pth", original_umt5()),
    ):
        read = torch.load(back / file, weights_only=True)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], state[name]) for name in state)
    assert json.loads((back / "config.json").read_text()) == original_config()
    assert (back / "google" / "umt5-xxl" / "tokenizer.json").is_file()
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


def test_a_diffusers_folder_is_read_by_diffusers(original: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path / "new"
    convert(original, folder, "diffusers", shard_bytes=2_000_000)
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    pipe = diffusers.WanPipeline.from_pretrained(folder)
    ours = find_parts(original)
    for module, part in (
        (pipe.transformer, "transformer"),
        (pipe.vae, "vae"),
        (pipe.text_encoder, "text_encoder"),
    ):
        state = module.state_dict()
        for name, value in ours.source(part).read():
            assert torch.equal(state[name], value), name
    assert pipe.transformer.config.num_attention_heads == 2
    assert pipe.vae.config.dim_mult == [1, 2, 4, 4]
    assert pipe.scheduler.config.flow_shift == 5.0
    assert pipe.tokenizer("cab").input_ids[-4:] == [5, 3, 4, 1]
    alone = diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    x, text = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 5, 16)
    with torch.no_grad():
        want = alone(x, torch.tensor([700.0]), text, return_dict=False)[0]
        got = load_wan_transformer(original)(x, torch.tensor([0.7]), text)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_the_scheduler_of_the_source_is_kept(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "a", "diffusers")
    path = tmp_path / "a" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    convert(tmp_path / "a" / "transformer", tmp_path / "b", "diffusers", base=tmp_path / "a")
    assert json.loads((tmp_path / "b/scheduler/scheduler_config.json").read_text())["shift"] == 3.0
    index = json.loads((tmp_path / "b" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


def test_a_generator_alone_becomes_a_transformer_folder(tmp_path: Path) -> None:
    torch.save({"generator_ema": original_transformer()}, tmp_path / "g.pt")
    assert convert(tmp_path / "g.pt", tmp_path / "out", "diffusers") == ["transformer"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["transformer"]
    load_wan_transformer(tmp_path / "out")


def test_names_in_single_files(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "x.pt", "self-forcing", dtype=torch.bfloat16)
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    state = content["generator"]
    assert set(state) == {f"model.{name}" for name in original_transformer()}
    want = original_transformer()["head.head.weight"].bfloat16()
    assert torch.equal(state["model.head.head.weight"], want)
    convert(original, tmp_path / "x.safetensors", "comfyui")
    prefix = "model.diffusion_model."
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert set(file.keys()) == {prefix + name for name in original_transformer()}


def test_heads_of_an_odd_width_survive_single_files(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    save_file(original_transformer(width=48), folder / "x.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_heads": 4}))
    for to, name in NAMES.items():
        convert(folder, tmp_path / name, to)
        assert load_wan_transformer(tmp_path / name).config.num_attention_heads == 4


def test_loras_are_merged_and_cast_once(original: Path, tmp_path: Path) -> None:
    state = original_transformer()
    change = torch.randn_like(state["blocks.0.ffn.0.weight"])
    save_file({"diffusion_model.blocks.0.ffn.0.diff": change}, tmp_path / "lora.safetensors")
    lora = ["--lora", str(tmp_path / "lora.safetensors"), "--lora-scale", "0.25"]
    args = [str(original), str(tmp_path / "out"), "--to", "original", "--dtype", "bf16", *lora]
    assert main(["convert", *args]) == 0
    got = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    want = (state["blocks.0.ffn.0.weight"] + 0.25 * change).bfloat16()
    assert torch.equal(got["blocks.0.ffn.0.weight"], want)
    assert torch.equal(got["blocks.1.ffn.0.weight"], state["blocks.1.ffn.0.weight"].bfloat16())
    vae = torch.load(tmp_path / "out" / "Wan2.1_VAE.pth", weights_only=True)
    assert vae["conv1.weight"].dtype == torch.float32


@pytest.mark.parametrize("recipe,stage", [("teacher", "teacher"), ("aad1", "aad")])
def test_a_pipeline_says_what_it_is(
    original: Path, tmp_path: Path, recipe: str, stage: str
) -> None:
    convert(original, tmp_path / "pipe", "pipeline", recipe=recipe)
    info = read_info(tmp_path / "pipe")
    assert (info.world, info.stage, info.width, info.height) == ("wan", stage, 832, 480)
    assert not list((tmp_path / "pipe").rglob("*.p*t*h"))
    parts = find_parts(tmp_path / "pipe")
    parts.require("transformer", "vae", "text_encoder", "tokenizer")
    card = (tmp_path / "pipe" / "README.md").read_text()
    count = sum(v.numel() for v in original_transformer().values())
    assert f"| parameters | {count:,} |" in card and stage in card


def test_a_pipeline_stays_what_it_says(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "one", "pipeline", recipe="self-forcing")
    info = replace(read_info(tmp_path / "one"), sha256="abc", updates=7)
    write_info(tmp_path / "one", info)
    convert(tmp_path / "one", tmp_path / "two", "pipeline")
    assert read_info(tmp_path / "two") == info
    convert(tmp_path / "one", tmp_path / "bf16", "pipeline", dtype=torch.bfloat16)
    assert read_info(tmp_path / "bf16") == replace(info, sha256="")
    convert(tmp_path / "one", tmp_path / "aad1", "pipeline", recipe="aad1")
    assert read_info(tmp_path / "aad1").stage == "aad"
    # Small shards are read again, the codec's too.
    convert(tmp_path / "one", tmp_path / "parts", "pipeline", shard_bytes=200_000)
    assert len(list((tmp_path / "parts" / "codec").glob("*.safetensors"))) > 1
    if importlib.util.find_spec("diffusers") and importlib.util.find_spec("transformers"):
        pipes = [Pipeline.from_pretrained(tmp_path / name) for name in ("one", "parts")]
        made = [p(None, "ab", num_chunks=1, size=(32, 32)) for p in pipes]
        assert torch.equal(made[0], made[1])


def test_what_is_wrong_is_told_and_nothing_is_written(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    torch.save({"generator": original_transformer()}, tmp_path / "g.pt")
    bad = original_transformer()
    del bad["head.modulation"]
    save_file(bad, tmp_path / "bad.safetensors")
    before = sorted(tmp_path.rglob("*"))
    out = str(tmp_path / "out")
    for args, words in (
        ([str(original), out, "--to", "onnx"], "must be one of diffusers, original"),
        ([str(original), out, "--to", "comfyui"], "must end in .safetensors"),
        ([str(original), str(full), "--to", "diffusers"], "something in it"),
        ([str(original), str(tmp_path / "g.pt"), "--to", "original"], "is a file"),
        ([str(tmp_path / "g.pt"), out, "--to", "pipeline"], "no vae, text_encoder, tokenizer"),
        ([str(tmp_path / "bad.safetensors"), out, "--to", "diffusers"], "1 missing"),
        ([str(tmp_path / "no"), out, "--to", "diffusers"], "does not exist"),
        ([str(original), out, "--to", "diffusers", "--dtype", "int8"], "--dtype must be one of"),
        ([str(original), out, "--to", "diffusers", "--lora-scale", "1"], "one number per LoRA (0)"),
        ([str(original), out, "--to", "diffusers", "--shard-gb", "0"], "above 0"),
        ([str(original), out, "--to", "pipeline", "--recipe", "x"], "recipe must be one of"),
        ([str(PACKAGED / "sprites"), out, "--to", "diffusers"], "rope_theta=4.0"),
        ([str(PACKAGED / "sprites"), out, "--to", "pipeline"], "pipeline already, of the small"),
    ):
        assert main(["convert", *args]) == 2
        printed = capsys.readouterr()
        assert words in printed.err and printed.err.count("\n") == 1, printed.err
        assert not printed.out
    assert sorted(tmp_path.rglob("*")) == before


def test_numbers_that_no_file_should_hold(original: Path, tmp_path: Path) -> None:
    state = original_transformer()
    state["blocks.0.ffn.0.bias"][3] = 1e6
    save_file(state, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "bf16.pt", "self-forcing", dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"proj.bias has numbers above 65504: no torch.float16"):
        convert(tmp_path / "x.safetensors", tmp_path / "a.pt", "self-forcing", dtype=torch.float16)
    state["blocks.0.ffn.0.bias"][3] = float("nan")
    save_file(state, tmp_path / "x.safetensors")
    for to, name in (("diffusers", "out"), ("comfyui", "out.safetensors")):
        with pytest.raises(UserError, match="holds NaN or infinity: the file is damaged"):
            convert(tmp_path / "x.safetensors", tmp_path / name, to, shard_bytes=500_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bf16.pt", "x.safetensors"]


def test_a_failed_conversion_leaves_nothing(original: Path, tmp_path: Path) -> None:
    save_file(original_transformer(), tmp_path / "x.safetensors")
    vae = original_vae()
    vae["conv1.weight"][0] = float("nan")
    torch.save(vae, tmp_path / "vae.pth")
    with pytest.raises(UserError, match=r"quant_conv\.weight holds NaN or infinity"):
        convert(tmp_path, tmp_path / "out" / "new", "original")
    assert not (tmp_path / "out" / "new").exists()
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "module,file,lost,told",
    [
        ("diffusers", "Wan2.1_VAE.pth", "decoder.head.2.bias", "decoder.conv_out.bias"),
        ("transformers", "models_t5_umt5-xxl-enc-bf16.pth", "blocks.1.ffn.fc1.weight",
         "encoder.block.1.layer.1.DenseReluDense.wi_1.weight"),
    ],
)  # fmt: skip
def test_parts_that_are_incomplete_are_not_copied(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    module: str, file: str, lost: str, told: str,
) -> None:  # fmt: skip
    pytest.importorskip(module)
    shutil.copytree(original, tmp_path / "own")
    path = tmp_path / "own" / file
    state = torch.load(path, weights_only=True)
    del state[lost]
    torch.save(state, path)
    for to in ("diffusers", "original", "pipeline"):
        assert main(["convert", str(path.parent), str(tmp_path / "out"), "--to", to]) == 2
        printed = capsys.readouterr()
        assert f"{file} does not fit the model: 1 missing ({told})" in printed.err
        assert printed.err.count("\n") == 1 and not printed.out
    assert [p.name for p in tmp_path.iterdir()] == ["own"]
    convert(path.parent, tmp_path / "x.pt", "self-forcing")  # which has the transformer alone
