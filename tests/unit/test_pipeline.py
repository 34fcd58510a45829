"""The pipeline on tiny random models: stream and call, folders, and what a user can get wrong."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from aad1 import model_names
from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.model_info import INDEX, read_info
from aad1.model_names import find_model
from aad1.models import text as text_module
from aad1.models.causal_codec import CausalCodec, CausalCodecConfig
from aad1.models.weights import WEIGHTS
from aad1.pipeline import Pipeline

Build = Callable[..., Pipeline]
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture
def pipe(tiny_pipeline: Build) -> Pipeline:
    return tiny_pipeline()


@pytest.fixture
def folder(pipe: Pipeline, tmp_path: Path) -> Path:
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def _forget_warnings() -> Iterator[None]:
    """Warnings are given once a process; let this test see its own."""
    before = set(text_module._warned)
    text_module._warned.clear()
    yield
    text_module._warned.update(before)


def first_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# -- generation -----------------------------------------------------------------------------------


def test_whole_call_equals_the_stream(pipe: Pipeline) -> None:
    whole = pipe(PICTURE, "red disc moves left", num_chunks=4, seed=3)
    parts = list(itertools.islice(pipe.stream(PICTURE, "red disc moves left", seed=3), 4))
    assert [len(p) for p in parts] == [5, 4, 4, 4]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == torch.uint8
    assert whole.shape == (17, 16, 16, 3)
    assert torch.equal(whole[0], torch.from_numpy(PICTURE))


def test_five_chunks_are_the_first_of_twenty(pipe: Pipeline) -> None:
    long = pipe(PICTURE, "left", num_chunks=20, seed=1)
    short = pipe(PICTURE, "left", num_chunks=5, seed=1)
    assert len(long) == 81
    assert len(short) == 21
    assert torch.equal(long[:21], short)


def test_the_seed_and_the_prompt_matter(pipe: Pipeline) -> None:
    base = pipe(PICTURE, "left", num_chunks=1, seed=0)
    assert torch.equal(pipe(PICTURE, "left", num_chunks=1, seed=0), base)
    for other in (
        pipe(PICTURE, "left", num_chunks=1, seed=1),
        pipe(PICTURE, "right", num_chunks=1, seed=0),
        pipe(255 - PICTURE, "left", num_chunks=1, seed=0),
    ):
        assert not torch.equal(other[1:], base[1:])


def test_a_new_prompt_takes_effect_from_the_next_chunk_only(pipe: Pipeline) -> None:
    plain = list(itertools.islice(pipe.stream(PICTURE, "left"), 4))
    stream = pipe.stream(PICTURE, "left")
    parts = [next(stream), next(stream)]
    stream.prompt = "right"
    parts += [next(stream), next(stream)]
    assert torch.equal(parts[0], plain[0])
    assert torch.equal(parts[1], plain[1])
    assert not torch.equal(parts[2], plain[2])
    # ... and the cache of what was shown is not rewritten: chunk 2 was committed with "left".
    text = ["left", "left", "left", "right", "right"]
    whole = pipe.generate_latents(pipe.encode_image(PICTURE), [text], [0], 4)
    assert torch.equal(pipe.codec.decode(whole)[0], torch.cat(parts))


def test_a_batch_equals_the_streams_of_its_seeds(pipe: Pipeline) -> None:
    image = pipe.encode_image(PICTURE)
    both = pipe.generate_latents(torch.cat([image, image]), [["left"], ["red"]], [5, 9], 3)
    for latents, prompt, seed in zip(both, ("left", "red"), (5, 9), strict=True):
        stream = pipe.stream(PICTURE, prompt, seed=seed)
        stream.chunks = 3
        alone = torch.cat([image, *stream.latents()], 2)
        torch.testing.assert_close(latents[None], alone, atol=1e-5, rtol=1e-5)


def test_a_wan_strided_codec_gives_sixteen_frames_a_chunk(tiny_pipeline: Build) -> None:
    torch.manual_seed(0)
    codec = CausalCodec(CausalCodecConfig(latent_channels=6, widths=(16, 12, 8, 8))).eval()
    pipe = tiny_pipeline(codec=codec, size=32)
    image = np.zeros((32, 32, 3), np.uint8)
    parts = list(itertools.islice(pipe.stream(image, ""), 3))
    assert [len(p) for p in parts] == [17, 16, 16]
    whole = pipe(image, "", num_chunks=3)
    assert whole.shape == (1 + 16 * 3, 32, 32, 3)
    assert torch.equal(torch.cat(parts), whole)


def test_streaming_leaves_the_callers_grad_mode_alone(pipe: Pipeline) -> None:
    stream = pipe.stream(PICTURE, "left")
    part = next(stream)
    assert torch.is_grad_enabled()
    assert not part.requires_grad
    with torch.enable_grad():
        assert not next(stream.pipeline.rollout.stream(
            pipe.encode_image(PICTURE), lambda i: pipe.encode_prompt("left"),
            lambda chunk, step: torch.zeros(1, 48, 4, 4, 4), 1,
        )).requires_grad  # fmt: skip


def test_training_works_after_generation_in_inference_mode(tiny_pipeline: Build) -> None:
    """RoPE tables are shared by all passes of a process; inference tensors would poison them."""
    pipe = tiny_pipeline(geometry=ChunkGeometry(chunk=3, window=11))
    with torch.inference_mode():
        pipe(PICTURE, "left", num_chunks=2)
    pipe.transformer.requires_grad_(True)
    x, text = pipe.encode_image(PICTURE), torch.zeros(1, 4, 8)
    geometry = pipe.info.geometry
    from aad1.core.chunks import block_causal

    x = x.expand(1, -1, 7, -1, -1)
    out = pipe.transformer(x, torch.ones(1), text, plan=block_causal(geometry, 7))
    out.sum().backward()
    assert pipe.transformer.proj_out.weight.grad is not None


@pytest.mark.parametrize("size", [(40, 20), (7, 90)])
def test_pictures_of_other_sizes_are_fitted(pipe: Pipeline, size: tuple[int, int]) -> None:
    picture = Image.fromarray(PICTURE).resize(size).convert("RGBA")
    assert pipe(picture, "left", num_chunks=1).shape == (5, 16, 16, 3)


# -- folders --------------------------------------------------------------------------------------


def test_a_saved_pipeline_makes_identical_frames(pipe: Pipeline, folder: Path) -> None:
    again = Pipeline.from_pretrained(folder)
    assert again.info == pipe.info
    assert torch.equal(
        again(PICTURE, "red disc", num_chunks=3, seed=2),
        pipe(PICTURE, "red disc", num_chunks=3, seed=2),
    )


def test_half_precision_folders_are_half_as_big(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "half", torch.float16)
    pipe.save_pretrained(tmp_path / "full")
    sizes = [(tmp_path / n / "transformer" / WEIGHTS).stat().st_size for n in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    again = Pipeline.from_pretrained(tmp_path / "half")
    assert again.transformer.dtype == torch.float32
    close = again(PICTURE, "left", num_chunks=1).int() - pipe(PICTURE, "left", num_chunks=1).int()
    assert int(close.abs().max()) <= 8


def test_an_unknown_model_suggests_the_nearest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packaged").mkdir()
    folder.rename(tmp_path / "packaged" / "doom")
    monkeypatch.setattr(model_names, "PACKAGED", tmp_path / "packaged")
    assert find_model("doom") == tmp_path / "packaged" / "doom"
    with pytest.raises(UserError, match="did you mean 'doom'") as error:
        Pipeline.from_pretrained("dooom")
    first_line(error)
    with pytest.raises(UserError, match=r"no model 'xyz'\. Packaged: doom") as error:
        Pipeline.from_pretrained("xyz")
    first_line(error)


def test_a_folder_without_an_index_is_no_model(folder: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match="has no model_index.json") as error:
        Pipeline.from_pretrained(folder)
    first_line(error)


@pytest.mark.parametrize("part", ["transformer", "codec", "text"])
def test_a_missing_part_is_named(folder: Path, part: str) -> None:
    (folder / part).rename(folder / "gone")
    with pytest.raises(UserError, match=f"{part}/config.json does not exist"):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, 4000])
def test_a_truncated_weight_file_is_named(folder: Path, keep: int) -> None:
    path = folder / "transformer" / WEIGHTS
    assert path.stat().st_size > keep
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{WEIGHTS} is truncated") as error:
        Pipeline.from_pretrained(folder)
    first_line(error)


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / INDEX).read_text())
    change(data)
    (folder / INDEX).write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda d: d["geometry"].update(window=3), "sink . chunk = 5 frames, got 3"),
        (lambda d: d["geometry"].update(chunk=0), "chunk must be at least 1, got 0"),
        (lambda d: d["geometry"].update(depth=1), "depth"),
        (lambda d: d["geometry"].update(single_pass=True), "single_pass .* no longer supported"),
        (lambda d: d.update(geometry=7), "geometry|mapping"),
        (lambda d: d.pop("geometry"), "has no 'geometry'"),
        (lambda d: d.update(width=0), "width must be at least 1, got 0"),
        (lambda d: d.update(width="wide"), "'<' not supported"),
        (lambda d: d.update(fps=-1), "fps must be above 0, got -1"),
        (lambda d: d.update(stage="best"), "dmd, aad, joint, distilled, got 'best'"),
        (lambda d: d.update(sigmas=[1, "x"]), "could not convert"),
        (lambda d: d.update(colour=1), "colour"),
        (lambda d: d.pop("world"), "world"),
        (lambda d: d.update(format="aad1.pipeline.9"), "format"),
    ],
)
def test_a_bad_index_is_told_in_one_line(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    read_info(folder)
    change_index(folder, change)
    with pytest.raises(UserError, match=message) as error:
        Pipeline.from_pretrained(folder)
    assert INDEX in first_line(error)


def test_a_single_pass_that_is_off_is_ignored(folder: Path) -> None:
    info = read_info(folder)
    change_index(folder, lambda d: d["geometry"].update(single_pass=False))
    assert read_info(folder) == info


def test_noise_levels_that_cannot_be_are_refused(folder: Path) -> None:
    change_index(folder, lambda d: d.update(sigmas=[0.5]))
    with pytest.raises(UserError, match="sigmas must start at 1"):
        Pipeline.from_pretrained(folder)(PICTURE, "left")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("proj_out.bias"), "1 missing .proj_out.bias."),
        (lambda t: t.update(extra=torch.zeros(1)), "1 unexpected .extra."),
        (lambda t: t.update({"proj_out.bias": torch.zeros(3)}), r"proj_out.bias is \[3\], exp"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    path = folder / "transformer" / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=message) as error:
        Pipeline.from_pretrained(folder)
    first_line(error)


def test_nan_weights_are_refused(folder: Path) -> None:
    for part in ("transformer", "text"):
        path = next((folder / part).glob("*.safetensors"))
        kept = path.read_bytes()
        tensors = load_file(path)
        name = max(tensors)
        tensors[name].view(-1)[0] = float("nan")
        save_file(tensors, path)
        with pytest.raises(UserError, match=f"is damaged: {name} holds NaN") as error:
            Pipeline.from_pretrained(folder)
        first_line(error)
        path.write_bytes(kept)
    Pipeline.from_pretrained(folder)


def test_loras_are_merged_into_a_saved_pipeline(folder: Path, tmp_path: Path) -> None:
    plain = Pipeline.from_pretrained(folder)
    name = "blocks.0.attn1.to_q"
    change = torch.randn_like(plain.transformer.state_dict()[f"{name}.weight"])
    save_file({f"transformer.{name}.diff": change}, tmp_path / "lora.safetensors")
    merged = Pipeline.from_pretrained(folder, loras=[(tmp_path / "lora.safetensors", 0.5)])
    for key, value in plain.transformer.state_dict().items():
        want = value + 0.5 * change if key == f"{name}.weight" else value
        torch.testing.assert_close(merged.transformer.state_dict()[key], want)
    assert merged.info.sha256 == "" and merged.info.geometry == plain.info.geometry
    with pytest.raises(UserError, match="one set of weights; leave out weights=ema"):
        Pipeline.from_pretrained(folder, weights="ema")


def test_a_runs_folder_points_to_its_model(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "final")
    with pytest.raises(UserError, match=f"whose model is {run / 'final'}") as error:
        Pipeline.from_pretrained(run)
    first_line(error)


def test_parts_that_do_not_belong_together_are_refused(
    folder: Path, tiny_pipeline: Build, tmp_path: Path
) -> None:
    pipe = tiny_pipeline()
    other = type(pipe.codec)(2)  # type: ignore[call-arg]
    other.save_pretrained(folder / "codec")
    with pytest.raises(UserError, match="latent channels must be the transformer's 48, got 12"):
        Pipeline.from_pretrained(folder)


# -- misuse ---------------------------------------------------------------------------------------


def test_a_teacher_refuses_to_stream(tiny_pipeline: Build) -> None:
    teacher = tiny_pipeline("teacher")
    with pytest.raises(UserError, match="bidirectional teacher"):
        teacher.stream(PICTURE, "left")
    with pytest.raises(UserError, match="bidirectional teacher"):
        teacher(PICTURE, "left")


@pytest.mark.parametrize("chunks", [0, -3])
def test_the_number_of_chunks_must_be_positive(pipe: Pipeline, chunks: int) -> None:
    with pytest.raises(UserError, match=f"num_chunks must be at least 1, got {chunks}"):
        pipe(PICTURE, "left", num_chunks=chunks)


def test_unreadable_pictures_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    empty, text = tmp_path / "empty.png", tmp_path / "text.png"
    empty.touch()
    text.write_text("not a picture")
    for path, message in (
        (empty, "is empty"),
        (text, "not an image"),
        (tmp_path / "none.png", "does not exist"),
        (np.zeros((0, 4, 3), np.uint8), "image"),
    ):
        with pytest.raises(UserError, match=message) as error:
            pipe.stream(path, "left")  # type: ignore[arg-type]
        first_line(error)


@pytest.mark.usefixtures("_forget_warnings")
def test_unknown_words_warn_once_and_list_the_known(pipe: Pipeline) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe(PICTURE, "gallop left", num_chunks=1)
        pipe(PICTURE, "gallop right", num_chunks=1)
    assert len(caught) == 1
    assert "left out of the prompt: gallop" in str(caught[0].message)
    assert "disc, left, moves, red, right" in str(caught[0].message)


@pytest.mark.usefixtures("_forget_warnings")
def test_empty_and_very_long_prompts_work(pipe: Pipeline) -> None:
    null = pipe.encode_prompt("")
    assert float(null.abs().max()) == 0
    assert bool(torch.isfinite(pipe(PICTURE, "", num_chunks=1).float()).all())
    with pytest.warns(UserWarning, match="first 4"):
        long = pipe(PICTURE, "red disc moves left " * 5000, num_chunks=1)
    assert torch.equal(long, pipe(PICTURE, "red disc moves left", num_chunks=1))
