"""Wan checkpoints in every format: the same network from each, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aad1.errors import UserError
from aad1.model_info import ModelInfo
from aad1.models import wan_keys
from aad1.models.checkpoints import find_parts, load_wan_transformer
from aad1.models.dit import WanConfig, WanTransformer
from aad1.models.text import WordEncoder, WordEncoderConfig
from aad1.models.umt5 import load_umt5
from aad1.models.wan_codec import load_wan_vae
from aad1.models.wan_shapes import wan_config
from aad1.models.weights import save_transformer
from aad1.pipeline import Pipeline
from wan_files import (
    State,
    original_transformer,
    original_umt5,
    original_vae,
    read_umt5,
    write_original,
    write_sharded,
    write_tokenizer,
)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


# ---- one network, written in each format --------------------------------------------------------


def _diffusers(path: Path, state: State) -> Path:
    save_transformer(reference(state), path / "transformer", None, limit=1_000_000)
    assert len(list((path / "transformer").glob("*.safetensors"))) > 2
    return path


def _original(path: Path, state: State) -> Path:
    write_sharded(path, "diffusion_pytorch_model", state, 3)
    return path


def _self_forcing(path: Path, state: State) -> Path:
    other = prefixed(original_transformer(seed=9), "model.")
    file = path / "self_forcing_dmd.pt"
    ema = prefixed(state, "model._fsdp_wrapped_module.")
    torch.save({"generator": other, "critic": other, "generator_ema": ema, "step": 600}, file)
    return file


def _only_generator(path: Path, state: State) -> Path:
    torch.save({"generator": prefixed(state, "model.")}, path / "ode_init.pt")
    return path / "ode_init.pt"


def _old_pickle(path: Path, state: State) -> Path:
    file = path / "model.pt"
    torch.save({"model": state}, file, _use_new_zipfile_serialization=False)
    return file


def _pt_shards(path: Path, state: State) -> Path:
    names = sorted(state)  # blocks are then spread over the shards, as text is sorted
    for i in range(6):
        part = {f"model.{n}": state[n] for n in names[i::6]}
        torch.save(part, path / f"model_{i}.pt")
    return path


def _plain(path: Path, state: State) -> Path:
    save_file(state, path / "anything.safetensors")
    return path / "anything.safetensors"


def _comfyui(path: Path, state: State) -> Path:
    save_file(prefixed(state, "model.diffusion_model."), path / "wan.safetensors")
    return path / "wan.safetensors"


def _diffusion_model(path: Path, state: State) -> Path:
    save_file(prefixed(state, "diffusion_model."), path / "aad.safetensors")
    return path


FORMATS = [_diffusers, _original, _self_forcing, _only_generator, _old_pickle, _pt_shards, _plain,
           _comfyui, _diffusion_model]  # fmt: skip


def reference(state: State) -> WanTransformer:
    """The network, filled by hand."""
    config = WanConfig(
        num_attention_heads=2, attention_head_dim=128, ffn_dim=64, num_layers=2, text_dim=16,
        freq_dim=32,
    )  # fmt: skip
    model = WanTransformer(config)
    renamed = {str(wan_keys.dit_from_original(name)): value for name, value in state.items()}
    model.load_state_dict(renamed, strict=True)
    return model.eval()


def frames(model: WanTransformer, codec: Any) -> Tensor:
    """Three streamed chunks through the codec."""
    torch.manual_seed(3)
    text = WordEncoder(WordEncoderConfig(words=("left", "right"), length=4, dim=16)).eval()
    info = ModelInfo(world="wan", width=32, height=16, fps=16.0, stage="aad", frames=9)
    image = torch.randint(0, 256, (16, 32, 3), dtype=torch.uint8).numpy()
    return Pipeline(model, codec, text, info)(image, "left", num_chunks=3, seed=5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_original(folder, seed=7)
    return folder


@pytest.fixture(scope="module")
def expected(base: Path) -> Tensor:
    pytest.importorskip("diffusers")
    return frames(reference(original_transformer()), load_wan_vae(base))


@pytest.mark.parametrize("write", FORMATS)
def test_each_format_streams_the_same_frames(
    write: Callable[[Path, State], Path], tmp_path: Path, base: Path, expected: Tensor
) -> None:
    path = write(tmp_path, original_transformer())
    parts = find_parts(path, base)
    assert parts.tokenizer == base / "google" / "umt5-xxl"
    model = load_wan_transformer(parts.source("transformer"))
    assert expected.float().std() > 5
    assert torch.equal(frames(model, load_wan_vae(parts.source("vae"))), expected)


def test_other_weights_of_a_pt_can_be_chosen(tmp_path: Path) -> None:
    file = _self_forcing(tmp_path, original_transformer())
    name = "blocks.1.attn2.to_v.weight"
    other = original_transformer(seed=9)["blocks.1.cross_attn.v.weight"]
    for weights, want in (("", False), ("generator_ema", False), ("generator", True)):
        source = find_parts(file, weights=weights).source("transformer")
        assert torch.equal(dict(source.read([name]))[name], other) is want
    with pytest.raises(UserError, match="no weights 'ema'; it has generator, critic"):
        find_parts(file, weights="ema")


def test_dtype_and_loading_of_a_part_by_path(base: Path) -> None:
    model = load_wan_transformer(base, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    want = original_transformer(seed=7)["blocks.0.ffn.0.weight"].bfloat16()
    assert torch.equal(model.state_dict()["blocks.0.ffn.net.0.proj.weight"], want)
    assert not model.training and all(p.device.type == "cpu" for p in model.parameters())
    config, state = read_umt5(base)
    assert config["d_model"] == 16
    assert torch.equal(state["shared.weight"], original_umt5()["token_embedding.weight"])


@pytest.mark.parametrize("width,ffn,layers,heads", [(1536, 8960, 30, 12), (5120, 13824, 40, 40)])
def test_published_sizes_are_known_from_shapes(
    width: int, ffn: int, layers: int, heads: int
) -> None:
    from aad1.models.tensor_files import Source, Spec, TensorFile

    with torch.device("meta"):
        state = original_transformer(width, layers, ffn, 4096, freq=256)
    specs = {name: Spec(tuple(t.shape), torch.bfloat16) for name, t in state.items()}
    file = TensorFile(Path("x.safetensors"), specs)
    places = {str(wan_keys.dit_from_original(n)): (file, n) for n in specs}
    config = wan_config(Source(Path("x.safetensors"), places))
    assert (config.num_attention_heads, config.attention_head_dim) == (heads, 128)
    assert (config.num_layers, config.width) == (layers, width)
    fewer = {n: place for n, place in places.items() if not n.startswith(f"blocks.{layers - 1}.")}
    with pytest.raises(UserError, match=f"incomplete: it has {layers - 1} of {layers} blocks of"):
        wan_config(Source(Path("x.safetensors"), fewer))


def test_heads_of_another_width_come_from_a_config(tmp_path: Path) -> None:
    save_file(original_transformer(width=48), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="width 48, no multiple of 128"):
        load_wan_transformer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4, "num_layers": 2}))
    assert load_wan_transformer(tmp_path).config.attention_head_dim == 12
    assert load_wan_transformer(tmp_path / "x.safetensors").config.attention_head_dim == 12
    other = {"dim": 5120, "num_heads": 40, "num_layers": 40}  # of a model that lay there before
    (tmp_path / "config.json").write_text(json.dumps(other))
    save_file(original_transformer(), tmp_path / "x.safetensors")
    assert load_wan_transformer(tmp_path).config.num_attention_heads == 2


def test_a_pipeline_folder_of_a_small_world_has_a_transformer() -> None:
    packaged = Path(__file__).parents[3] / "src/aad1/packaged/sprites"
    parts = find_parts(packaged)
    assert (parts.vae, parts.text_encoder, parts.tokenizer) == (None, None, None)
    loaded = load_wan_transformer(parts.source("transformer"))
    want = WanTransformer.from_pretrained(packaged / "transformer")
    assert loaded.config == want.config and loaded.config.prediction == "x0"
    file = packaged / "transformer" / "diffusion_pytorch_model.safetensors"
    assert load_wan_transformer(file).config == want.config
    for name, value in want.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


# ---- what is wrong is told in one line ----------------------------------------------------------


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_missing_parts_are_listed_with_where_they_were_looked_for(tmp_path: Path) -> None:
    _original(tmp_path / "a", original_transformer())
    (tmp_path / "b" / "vae").mkdir(parents=True)
    save_file(original_vae(), tmp_path / "b" / "vae" / "x.safetensors")
    parts = find_parts(tmp_path / "a", tmp_path / "b")
    parts.require("transformer", "vae")
    refused(
        lambda: parts.require("transformer", "vae", "text_encoder", "tokenizer"),
        "no text_encoder, tokenizer found", str(tmp_path / "a"), str(tmp_path / "b" / "vae"),
    )  # fmt: skip
    (tmp_path / "empty").mkdir()
    refused(lambda: find_parts(tmp_path / "empty"), "no Wan weights found", "empty")
    refused(lambda: find_parts(tmp_path / "nowhere"), "nowhere does not exist")


def test_a_base_does_not_stand_in_for_what_is_damaged(tmp_path: Path, base: Path) -> None:
    """Or a distilled generator that was cut off while it was fetched would be its teacher."""
    folder = tmp_path / "own"
    write_original(folder, seed=3)
    transformer = folder / "diffusion_pytorch_model.safetensors"
    for file, rest in ((transformer, "no transformer found"), (folder / "Wan2.1_VAE.pth", "vae")):
        kept = file.read_bytes()
        file.write_bytes(kept[: len(kept) // 2])
        refused(lambda: find_parts(folder, base), f"{file} is truncated", rest)
        file.write_bytes(kept)
    transformer.unlink()
    refused(lambda: find_parts(folder, base), "no transformer found", str(folder))
    torch.save({"generator": original_transformer(), "x": Evil("never")}, folder / "evil.pt")
    refused(lambda: find_parts(folder, base), "no transformer found", "evil.pt", "could run any")
    refused(lambda: find_parts(base / "Wan2.1_VAE.pth", base), "no transformer found")


def test_a_base_stands_in_beside_files_that_are_no_part(tmp_path: Path, base: Path) -> None:
    """As in a release that has its LoRA in the same folder."""
    _plain(tmp_path, original_transformer())
    save_file({"diffusion_model.blocks.0.ffn.0.diff": torch.zeros(2)}, tmp_path / "l.safetensors")
    parts = find_parts(tmp_path, base)
    assert parts.source("vae").where == base / "Wan2.1_VAE.pth" and not parts.unread
    assert "is a LoRA" in parts.problems[0]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    _original(tmp_path, original_transformer())
    shard = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    kept = shard.read_bytes()
    shard.unlink()
    refused(lambda: load_wan_transformer(tmp_path), "00002-of-00003.safetensors does not exist")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    refused(
        lambda: load_wan_transformer(tmp_path),
        "00002-of-00003.safetensors does not exist, one of 3",
    )
    shard.write_bytes(kept)
    load_wan_transformer(tmp_path)  # complete again, without an index
    shard.write_bytes(kept[:-10])
    refused(lambda: load_wan_transformer(tmp_path), "00002-of-00003", "truncated")


def test_a_shard_that_cannot_be_read_is_named_where_its_tensors_are_missed(tmp_path: Path) -> None:
    """Shards without numbers in their names, of which the others look like a network by itself."""
    _pt_shards(tmp_path, original_transformer())
    shard = tmp_path / "model_3.pt"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-200])
    refused(lambda: load_wan_transformer(tmp_path), "missing", f"{shard} is truncated")
    for file in sorted(tmp_path.iterdir()):
        file.unlink()
    torch.save(original_vae(), tmp_path / "vae.pth")  # beside which all others are unread
    shard.write_bytes(whole[:-200])
    refused(lambda: load_wan_transformer(tmp_path), "no transformer found", f"{shard} is truncated")
    shard.unlink()
    (tmp_path / "vae.pth").unlink()
    state = original_transformer()
    head = {n: state.pop(n) for n in list(state) if n.startswith(("head", "patch_embedding"))}
    torch.save(state, tmp_path / "a.pt")
    torch.save({"model": head, "args": Namespace(lr=1)}, tmp_path / "b.pt")
    refused(
        lambda: load_wan_transformer(tmp_path),
        "incomplete: it has no patch_embedding.weight", "b.pt holds a Python object",
    )  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(base: Path, tmp_path: Path, value: float) -> None:
    """One among all, in any part; without this a grey video would come out, and exit code 0."""
    state, vae, text = original_transformer(), original_vae(), original_umt5()
    state["blocks.1.ffn.0.bias"][7] = value
    path = _plain(tmp_path, state)
    for dtype in (torch.float32, torch.bfloat16):
        refused(
            lambda dtype=dtype: load_wan_transformer(path, dtype),
            str(path), "is damaged: blocks.1.ffn.net.0.proj.bias holds NaN or infinity",
        )  # fmt: skip
    state["head.modulation"][0, 1, 2] = value
    refused(lambda: load_wan_transformer(_plain(tmp_path, state)), "(and 1 more) holds")
    vae["decoder.head.2.bias"][0] = value
    torch.save(vae, tmp_path / "vae.pth")
    refused(lambda: load_wan_vae(tmp_path / "vae.pth"), "vae.pth is damaged: decoder.conv_out.bias")
    text["blocks.0.ffn.fc1.weight"][0, 0] = value
    torch.save(text, tmp_path / "t5.pth")
    source = find_parts(tmp_path / "t5.pth").source("text_encoder")
    pytest.importorskip("transformers")
    refused(lambda: load_umt5(source, torch.float32, torch.device("cpu")), "t5.pth is damaged")


def test_large_numbers_are_numbers(tmp_path: Path) -> None:
    """Two that add up to infinity in float32 are no reason to refuse."""
    state = original_transformer()
    state["head.head.bias"][:2] = 3e38
    assert not bool(state["head.head.bias"].sum().isfinite())
    load_wan_transformer(_plain(tmp_path, state))


def test_a_checkpoint_of_torch_distributed_is_refused_and_the_way_out_works(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = tmp_path / "step" / "model"
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": original_transformer()}, checkpoint_id=folder)
    assert list(folder.glob("*.distcp"))
    for path in (folder, folder.parent):
        way = f"format_utils dcp_to_torch {folder} weights.pt"
        refused(lambda path=path: find_parts(path), f"{folder} is a checkpoint of torch.dist", way)
    dcp_to_torch_save(folder, tmp_path / "weights.pt")
    got = load_wan_transformer(tmp_path / "weights.pt").state_dict()
    for name, value in reference(original_transformer()).state_dict().items():
        assert torch.equal(got[name], value), name
    (folder.parent / "meta.json").write_text("{}")  # one of this package's own
    refused(lambda: find_parts(folder.parent), "give the run's final/ folder")


def test_what_git_leaves_in_place_of_weights_is_told(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.pt"):
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        (tmp_path / name).write_text(pointer)
        refused(lambda name=name: find_parts(tmp_path / name), name, "`git lfs pull`")
    refused(lambda: find_parts(tmp_path), "no Wan weights found", "`git lfs pull`")


def test_a_config_of_the_other_size_is_told(tmp_path: Path) -> None:
    """As after copying shards of 1.3B over those of 14B, or the reverse."""
    _diffusers(tmp_path, original_transformer())
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 40}))
    refused(
        lambda: load_wan_transformer(tmp_path),
        "mixes parts of different models", "of width 256", "config.json says 5120 (14B)",
    )  # fmt: skip


def test_shards_of_different_models_are_told(tmp_path: Path) -> None:
    small = original_transformer(width=128)
    _original(tmp_path, original_transformer())
    shard = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    save_file({name: small[name] for name in load_file(shard)}, shard)
    refused(
        lambda: load_wan_transformer(tmp_path),
        "mixes parts of different models", "width 128", "width 256", shard.name,
    )  # fmt: skip


def test_a_part_given_as_another_is_told(tmp_path: Path, base: Path) -> None:
    refused(
        lambda: load_wan_transformer(base / "Wan2.1_VAE.pth"),
        "Wan2.1_VAE.pth holds a Wan VAE, not a Wan transformer",
    )
    refused(lambda: load_wan_vae(_plain(tmp_path, original_transformer())), "not a Wan VAE")
    save_file({"visual.x": torch.zeros(2)}, tmp_path / "clip.safetensors")
    refused(lambda: find_parts(tmp_path / "clip.safetensors"), "holds no Wan transformer")


def test_parts_that_do_not_belong_together_are_told(tmp_path: Path) -> None:
    _plain(tmp_path, original_transformer())
    torch.save(original_umt5(width=24), tmp_path / "t5.pth")
    refused(lambda: find_parts(tmp_path), "do not belong together", "text width 16 and 24")


def test_two_of_a_kind_are_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _original(tmp_path / name, original_transformer())
    refused(lambda: find_parts(tmp_path), "holds 2 networks", "/a,", "give the path of one")
    for step in (100, 200):  # a folder of checkpoints, not of shards
        torch.save(original_transformer(seed=step), tmp_path / "a" / f"{step}.pt")
    (tmp_path / "a" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    for shard in (tmp_path / "a").glob("*.safetensors"):
        shard.unlink()
    refused(lambda: find_parts(tmp_path / "a"), "holds 2 networks", "100.pt", "200.pt")


@pytest.mark.parametrize(
    "name,words",
    [
        ("img_emb.proj.0.weight", "CLIP image branch"),
        ("blocks.0.cross_attn.k_img.weight", "CLIP image branch"),
        ("vace_blocks.0.after_proj.weight", "VACE"),
        ("scaled_fp8", "fp8"),
        ("face_adapter.fuser_blocks.0.x", "Animate"),
    ],
)
def test_variants_are_named(tmp_path: Path, name: str, words: str) -> None:
    path = _plain(tmp_path, original_transformer() | {name: torch.zeros(2)})
    refused(lambda: load_wan_transformer(path), words, "not supported", name)


@pytest.mark.parametrize("channels,words", [(36, "Wan 2.2 image-to-video"), (48, "Wan 2.2 5B")])
def test_wan_2_2_is_named(tmp_path: Path, channels: int, words: str) -> None:
    path = _plain(tmp_path, original_transformer(channels=channels, text=4096))
    refused(lambda: load_wan_transformer(path), words, "not supported")
    torch.save(original_vae(z=channels), tmp_path / "vae.pth")
    refused(lambda: load_wan_vae(tmp_path / "vae.pth"), "Wan 2.2" if channels == 48 else "16")


class Evil:
    """What runs when it is unpickled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_needs_code_is_refused(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "evil.pt"
    content = {"generator": original_transformer(), "args": Evil(str(tmp_path / "ran"))}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    refused(lambda: find_parts(path), "evil.pt", "mkdir", "could run any code", "aad1 convert")
    assert not (tmp_path / "ran").exists()
    torch.save({"model": {}, "args": Namespace(lr=1)}, path)
    refused(lambda: find_parts(path), "argparse.Namespace")


@pytest.mark.parametrize("content", [b"", b"garbage" * 9, b"PK\x03\x04" + b"x" * 99])
def test_damaged_pickles_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    refused(lambda: find_parts(path), "x.pt is truncated or not a PyTorch file")
    torch.save(original_transformer(), path)
    path.write_bytes(path.read_bytes()[:-200])
    refused(lambda: find_parts(path), "x.pt is truncated or not a PyTorch file")
    torch.save([1], path)
    refused(lambda: find_parts(path), "must hold a dict")


def test_a_pickle_that_torch_did_not_write_is_one_line(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for protocol in (2, 4, 5):
        with (tmp_path / "x.pt").open("wb") as file:
            pickle.dump({"args": Evil(str(tmp_path / "ran"))}, file, protocol)
        refused(lambda: find_parts(tmp_path / "x.pt"), "x.pt")
    assert not recwarn.list and not (tmp_path / "ran").exists()


def test_names_that_do_not_fit_are_counted_before_anything_is_read(tmp_path: Path) -> None:
    state = original_transformer()
    state["extra.weight"] = state.pop("blocks.0.self_attn.q.bias")
    refused(
        lambda: load_wan_transformer(_plain(tmp_path, state)),
        "1 missing (blocks.0.attn1.to_q.bias)", "1 unexpected (extra.weight)",
    )  # fmt: skip
    twice = original_transformer()
    twice["model.head.head.bias"] = twice["head.head.bias"].clone()
    refused(lambda: find_parts(_plain(tmp_path, twice)), "head.head.bias twice")


def test_tokenizers_of_clip_are_not_taken(tmp_path: Path) -> None:
    _plain(tmp_path, original_transformer())
    write_tokenizer(tmp_path / "a-roberta")
    (tmp_path / "a-roberta" / "sentencepiece.bpe.model").touch()
    assert find_parts(tmp_path).tokenizer is None
    write_tokenizer(tmp_path / "google" / "umt5")
    assert find_parts(tmp_path).tokenizer == tmp_path / "google" / "umt5"


# ---- memory -------------------------------------------------------------------------------------

_PEAK = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from aad1.models import checkpoints, weights
path = Path(sys.argv[1])
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
checkpoints.load_wan_transformer(sys.argv[2])  # imports and buffers are there now
before = peak()
if sys.argv[3] == "all":  # how one would do it without care: a state dict, then a model
    state = dict(checkpoints.find_parts(path).source("transformer").read())
    state = {name: value.clone() for name, value in state.items()}
model = checkpoints.load_wan_transformer(path)
size = sum(p.numel() * 4 for p in model.parameters())
print(size, peak() - before)
"""


def measure(folder: Path, kind: str, how: str) -> tuple[int, int, int]:
    """Bytes of the model, of the largest file, and of host memory that loading took at most."""
    state = original_transformer(width=640, layers=6, ffn=1280)
    big, tiny, shards = folder / "big", folder / "tiny", 6
    tiny.mkdir()
    _plain(tiny, original_transformer())
    if kind == "safetensors":
        write_sharded(big, "model", state, shards)
    else:
        big.mkdir()
        for i in range(shards):
            part = {n: state[n] for n in list(state)[i::shards]}
            torch.save(part, big / f"{i}.pt", _use_new_zipfile_serialization=kind == "pt")
    args = [sys.executable, "-c", _PEAK, str(big), str(tiny), how]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(args, capture_output=True, text=True, env=env, check=True)
    size, used = map(int, done.stdout.split())
    return size, max(file.stat().st_size for file in big.iterdir()), used


linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory as Linux counts it")


@linux
@pytest.mark.parametrize("kind", ["safetensors", "pt", "old pt"])
def test_loading_holds_one_shard_beyond_the_model(tmp_path: Path, kind: str) -> None:
    size, shard, used = measure(tmp_path, kind, "streamed")
    assert size > 3 * shard
    assert size < used < size + shard + (8 << 20), (size, shard, used)


@linux
def test_the_measure_sees_a_second_copy(tmp_path: Path) -> None:
    size, _, used = measure(tmp_path, "safetensors", "all")
    assert used > 2 * size
