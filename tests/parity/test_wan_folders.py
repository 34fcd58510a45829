"""Wan's folders as pipelines, `aad1 generate` with them, and what one can get wrong."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aad1 import cli
from aad1.convert import convert
from aad1.errors import UserError
from aad1.fast.handover import Handover
from aad1.media.reading import read_video
from aad1.models.umt5 import Umt5Encoder
from aad1.pipeline import Pipeline
from aad1.rollout.teacher import Sampling
from aad1.wan_folder import RECIPES, few_step_sigmas

pytest.importorskip("diffusers")

SIZE = (32, 48)
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def copy(wan_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Wan that a test may spoil."""
    shutil.copytree(wan_folder, tmp_path / "wan")
    return tmp_path / "wan"


def frames(pipe: Pipeline) -> torch.Tensor:
    return pipe(None, "a cat", num_chunks=2, seed=3, size=SIZE)


# -- folders --------------------------------------------------------------------------------------


def test_a_generator_alone_takes_the_rest_from_a_base(wan_folder: Path, tmp_path: Path) -> None:
    want = frames(Pipeline.from_pretrained(wan_folder, recipe="one-forcing"))
    shutil.copytree(wan_folder / "transformer", tmp_path / "generator")
    alone = Pipeline.from_pretrained(tmp_path / "generator", base=wan_folder, recipe="one-forcing")
    assert torch.equal(frames(alone), want)
    (tmp_path / "nested").mkdir()
    (tmp_path / "generator").rename(tmp_path / "nested" / "transformer")
    nested = Pipeline.from_pretrained(tmp_path / "nested", base=wan_folder, recipe="one-forcing")
    assert torch.equal(frames(nested), want)


def test_a_saved_pipeline_holds_everything(wan_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(wan_folder, recipe="self-forcing")
    folder = tmp_path / "mine"
    pipe.save_pretrained(folder)
    again = Pipeline.from_pretrained(folder)
    assert again.info == pipe.info
    assert torch.equal(frames(again), frames(pipe))
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    card = (folder / "README.md").read_text()
    assert "4 network passes per chunk" in card and "832x480" in card
    count = sum(p.numel() for p in pipe.transformer.parameters())
    assert f"{count:,}" in card
    one = Pipeline.from_pretrained(folder, steps=1)
    assert one.info.sigmas == (1.0,)
    assert not torch.equal(frames(one), frames(pipe))


def test_a_saved_teacher_samples_the_same(wan_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(wan_folder)
    pipe.save_pretrained(tmp_path / "mine")
    again = Pipeline.from_pretrained(tmp_path / "mine")
    assert again.info == pipe.info
    call: dict[str, Any] = dict(size=SIZE, frames=5, sampling=Sampling(steps=2))
    assert torch.equal(again.sample("a cat", **call), pipe.sample("a cat", **call))
    assert "does not stream" in (tmp_path / "mine" / "README.md").read_text()


@pytest.mark.parametrize("text", ["reference", "none"])
def test_the_text_encoder_may_stay_outside(wan_folder: Path, tmp_path: Path, text: str) -> None:
    pipe = Pipeline.from_pretrained(wan_folder, recipe="one-forcing")
    pipe.save_pretrained(tmp_path / "mine", text=text)  # type: ignore[arg-type]
    assert not (tmp_path / "mine" / "text" / "text_encoder").exists()
    if text == "none":
        with pytest.raises(UserError, match="give a base folder"):
            Pipeline.from_pretrained(tmp_path / "mine")
    base = wan_folder if text == "none" else None
    again = Pipeline.from_pretrained(tmp_path / "mine", base=base)
    assert torch.equal(frames(again), frames(pipe))


def test_the_base_may_have_any_layout(wan_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(wan_folder, recipe="one-forcing")
    pipe.save_pretrained(tmp_path / "mine", text="none")
    convert(wan_folder, tmp_path / "original", "original")
    again = Pipeline.from_pretrained(tmp_path / "mine", base=tmp_path / "original")
    assert torch.equal(frames(again), frames(pipe))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_a_missing_part_is_named_with_where_it_was_looked_for(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(UserError, match=f"no {part} found; looked in {copy}") as error:
        Pipeline.from_pretrained(copy)
    assert "\n" not in str(error.value)


def change_index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_kinds_of_wan_are_named_as_such(copy: Path) -> None:
    change_index(copy, _class_name="WanImageToVideoPipeline")
    with pytest.raises(UserError, match="is a WanImageToVideoPipeline"):
        Pipeline.from_pretrained(copy)
    change_index(
        copy, _class_name="WanPipeline", transformer_2=["diffusers", "WanTransformer3DModel"]
    )
    with pytest.raises(UserError, match=r"two transformers .Wan 2\.2."):
        Pipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(recipe="magic"), "teacher, aad1, self-forcing, .* got 'magic'"),
        (dict(recipe="self-forcing", steps=3), "steps must be one of 1, 2, 4, got 3"),
    ],
)
def test_bad_options_name_the_value(
    wan_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Pipeline.from_pretrained(wan_folder, **options)


def test_a_generator_alone_needs_a_recipe_and_a_base(wan_folder: Path) -> None:
    generator = wan_folder / "transformer"
    with pytest.raises(UserError, match="no vae, text_encoder, tokenizer found; looked in"):
        Pipeline.from_pretrained(generator, recipe="aad1")
    with pytest.raises(UserError, match="name a recipe of teacher, aad1, self-forcing"):
        Pipeline.from_pretrained(generator, base=wan_folder)


def test_parts_of_other_sizes_are_refused(copy: Path) -> None:
    import transformers

    config = json.loads((copy / "text_encoder" / "config.json").read_text())
    shutil.rmtree(copy / "text_encoder")
    other = transformers.UMT5EncoderModel(transformers.UMT5Config(**{**config, "d_model": 24}))
    other.save_pretrained(copy / "text_encoder")
    with pytest.raises(UserError, match="do not belong together: text width 16 and 24"):
        Pipeline.from_pretrained(copy)


@pytest.mark.parametrize("to", ["diffusers", "original", "self-forcing", "comfyui", "pipeline"])
def test_every_format_streams_the_same_frames(wan_folder: Path, tmp_path: Path, to: str) -> None:
    want = frames(Pipeline.from_pretrained(wan_folder, recipe="one-forcing"))
    suffix = {"self-forcing": ".pt", "comfyui": ".safetensors"}.get(to, "")
    made = tmp_path / f"made{suffix}"
    convert(wan_folder, made, to, recipe="one-forcing")
    options: dict[str, Any] = {} if to == "pipeline" else {"recipe": "one-forcing"}
    if suffix:
        options["base"] = wan_folder
    assert torch.equal(frames(Pipeline.from_pretrained(made, **options)), want)


def test_a_folder_of_pt_shards_streams_the_same_frames(wan_folder: Path, tmp_path: Path) -> None:
    """As AAD-1's own release comes: original names, several .pt files, no index."""
    want = frames(Pipeline.from_pretrained(wan_folder, recipe="one-forcing"))
    convert(wan_folder, tmp_path / "one.pt", "self-forcing")
    state = torch.load(tmp_path / "one.pt", weights_only=True)["generator"]
    (tmp_path / "shards").mkdir()
    names = list(state)
    for i in range(6):
        part = {name.removeprefix("model."): state[name] for name in names[i::6]}
        torch.save(part, tmp_path / "shards" / f"model-{i + 1:05}-of-00006.pt")
    pipe = Pipeline.from_pretrained(tmp_path / "shards", base=wan_folder, recipe="one-forcing")
    assert torch.equal(frames(pipe), want)


def test_few_step_levels_are_the_warped_ones() -> None:
    assert few_step_sigmas(1) == (1.0,)
    assert few_step_sigmas(2) == pytest.approx((1.0, 5 / 6))
    assert few_step_sigmas(4) == pytest.approx((1.0, 0.9375, 5 / 6, 0.625))
    assert RECIPES["aad1"].geometry.window == 9 and not RECIPES["aad1"].text_to_video


# -- sizes and images -----------------------------------------------------------------------------


def test_pictures_are_cropped_not_distorted(wan_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(wan_folder, recipe="aad1")
    picture = np.random.default_rng(0).integers(0, 256, (32, 80, 3), dtype=np.uint8)
    for size, box in (((32, 32), np.s_[:, 24:56]), ((64, 32), np.s_[:, 8:72])):
        got = pipe.encode_image(picture, size)
        assert got.shape == (1, 16, 1, size[1] // 8, size[0] // 8)
        assert torch.equal(got, pipe.encode_image(picture[box], size))
    stream = pipe.stream(picture, "a cat", size=(64, 32))
    first = next(stream)
    assert first.shape == (17, 32, 64, 3)


@pytest.mark.parametrize("size", [(832, 480), (480, 832), (1280, 720), (720, 1280), (16, 16)])
def test_usual_sizes_are_accepted(wan_folder: Path, size: tuple[int, int]) -> None:
    pipe = Pipeline.from_pretrained(wan_folder, recipe="aad1")
    assert pipe.check_size(size) == size
    assert pipe.check_size(None) == (832, 480)
    # A square in the middle stays a square in the middle: at full size, upright and lying.
    side = min(size) // 2
    picture = np.zeros((2 * min(size), 3 * max(size), 3), np.uint8)
    top, left = picture.shape[0] // 2 - side, picture.shape[1] // 2 - side
    picture[top : top + 2 * side, left : left + 2 * side] = 255
    seen: list[torch.Tensor] = []
    pipe.codec.encode = lambda video: seen.append(video) or video  # type: ignore
    pipe.encode_image(picture, size)
    (fitted,) = seen
    assert fitted.shape == (1, 1, size[1], size[0], 3)
    bright = (fitted[0, 0, :, :, 0] > 127).nonzero()
    (y0, x0), (y1, x1) = bright.min(0).values, bright.max(0).values
    assert abs(int(y1 - y0) - int(x1 - x0)) <= 2
    assert abs(int(y0 + y1) - size[1] + 1) <= 2 and abs(int(x0 + x1) - size[0] + 1) <= 2


def test_what_is_wrong_is_told_before_the_weights_are_read(
    wan_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("aad1.model_folder.load_wan", never)
    picture = tmp_path / "in.png"
    Image.fromarray(np.full((50, 70, 3), 99, np.uint8)).save(picture)
    few = dict(recipe="self-forcing")
    for flags, message in (
        (few | dict(size="832x488"), "height 488 is not divisible by 16 (nearest 480 or 496)"),
        (few | dict(image=tmp_path / "gone.png"), "gone.png"),
        (few | dict(seconds=-1), "seconds must be above 0, got -1"),
        (few | dict(shift=3), "--shift is for teachers"),
        (dict(recipe="aad1"), "this model continues an image: give one (--image)"),
        (dict(image=picture), "bidirectional teacher and cannot stream"),
        (dict(endless=True), "--endless needs a distilled model"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(guidance=-1), "guidance must be at least 0, got -1"),
        (dict(seconds=-1), "seconds must be above 0, got -1"),
    ):
        assert run(*command(wan_folder, tmp_path / "o.mp4", **flags)) == 2
        assert message in capsys.readouterr().err
    for flags in (few | dict(size="832x480"), dict(recipe="aad1", image=picture), dict(steps=3)):
        with pytest.raises(AssertionError, match="weights were read"):
            run(*command(wan_folder, tmp_path / "o.mp4", **flags))
    pytest.importorskip("fastapi")
    assert run("serve", "--model", wan_folder, "--port", "0") == 2
    assert "bidirectional teacher and cannot stream" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(850, 480), (832, 481), (0, 480), (832, -16)])
def test_other_sizes_are_refused(wan_folder: Path, size: tuple[int, int]) -> None:
    pipe = Pipeline.from_pretrained(wan_folder, recipe="aad1")
    with pytest.raises(UserError, match="is not divisible by 16 .nearest") as error:
        pipe.stream(np.zeros((8, 8, 3), np.uint8), "", size=size)
    assert str(size[0] if size[0] != 832 else size[1]) in str(error.value)


def test_a_model_that_continues_an_image_asks_for_one(wan_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(wan_folder, recipe="aad1")
    with pytest.raises(UserError, match="continues an image: give one"):
        pipe.stream(None, "a cat")
    with pytest.raises(UserError, match=r"distilled to 1 step.s. and streams"):
        pipe.sample("a cat")


def test_offloaded_it_makes_the_same_frames_and_keeps_no_encoder(wan_folder: Path) -> None:
    cpu = torch.device("cpu")  # see tests/unit/models/test_offload.py
    plain = Pipeline.from_pretrained(wan_folder, recipe="self-forcing")
    pipe = Pipeline.from_pretrained(wan_folder, recipe="self-forcing")
    pipe._offload(cpu)
    assert torch.equal(frames(pipe), frames(plain))
    assert isinstance(pipe.text, Umt5Encoder) and not pipe.text.loaded
    assert isinstance(plain.text, Umt5Encoder) and plain.text.loaded
    teacher = Pipeline.from_pretrained(wan_folder)
    teacher._offload(cpu)
    assert isinstance(teacher.text, Umt5Encoder)
    loads, load = [], teacher.text._load
    teacher.text._load = lambda: loads.append(1) or load()  # type: ignore[func-returns-value]
    few = Sampling(steps=2, guidance=3)
    video = teacher.sample("a dog", size=SIZE, frames=5, sampling=few)
    want = Pipeline.from_pretrained(wan_folder).sample("a dog", size=SIZE, frames=5, sampling=few)
    assert torch.equal(video, want)
    assert loads == [1] and not teacher.text.loaded  # once for both prompts


# -- aad1 generate --------------------------------------------------------------------------------


def run(*words: object) -> int:
    try:
        return cli.main([str(w) for w in words])
    except SystemExit as end:
        return int(end.code or 0)


def command(folder: Path, out: Path, **flags: object) -> list[object]:
    words: list[object] = ["generate", "--model", folder, "--prompt", "a cat", "--out", out]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
    return words


def test_generate_samples_a_teacher(wan_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.mp4"
    flags = dict(size="48x32", steps=3, seconds=0.5, guidance=2, negative_prompt="blurred", seed=4)
    assert run(*command(wan_folder, out, scale=1, **flags)) == 0
    assert "9 frames, 3 steps" in capsys.readouterr().out
    pipe = Pipeline.from_pretrained(wan_folder)
    sampling = Sampling(steps=3, guidance=2, shift=3.0, negative_prompt="blurred")
    want = pipe.sample("a cat", seed=4, size=(48, 32), frames=9, sampling=sampling)
    got = read_video(out)
    assert got.shape == want.shape
    other = pipe.sample("a cat", seed=5, size=(48, 32), frames=9, sampling=sampling)
    near, far = ((got.float() - x.float()).abs().mean() for x in (want, other))
    assert float(near) < 0.8 * float(far)  # H.264 and half the colours take their share of noise


def test_generate_streams_from_text(wan_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.mp4"
    flags = dict(recipe="one-forcing", size="32x48", seconds=1.5, text_cache=tmp_path / "cache")
    assert run(*command(wan_folder, out, scale=1, **flags)) == 0
    assert "33 frames, 3 chunks" in capsys.readouterr().out
    assert len(read_video(out)) == 33
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_generate_continues_an_image(wan_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    picture, out = tmp_path / "in.png", tmp_path / "out.mp4"
    Image.fromarray(np.full((50, 70, 3), 99, np.uint8)).save(picture)
    shutil.copytree(wan_folder / "transformer", tmp_path / "generator")
    flags = dict(base=wan_folder, recipe="aad1", size="48x32", chunks=2, image=picture, steps=2)
    assert run(*command(tmp_path / "generator", out, **flags)) == 0
    assert "33 frames, 2 chunks" in capsys.readouterr().out


def test_generate_merges_loras_into_a_generator_file(
    wan_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    from safetensors.torch import save_file

    convert(wan_folder, tmp_path / "g.pt", "self-forcing")
    name = "diffusion_model.blocks.0.ffn.0"
    lora = {
        f"{name}.lora_up.weight": torch.randn(48, 2),
        f"{name}.lora_down.weight": torch.randn(2, 256),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    flags = dict(base=wan_folder, recipe="one-forcing", size="32x32", chunks=1)
    made = []
    for more in ({}, {"lora": tmp_path / "lora.safetensors", "lora_scale": 0.5}):
        assert run(*command(tmp_path / "g.pt", tmp_path / "o.gif", scale=1, **flags, **more)) == 0
        made.append((tmp_path / "o.gif").read_bytes())
    assert made[0] != made[1]
    assert run(*command(tmp_path / "g.pt", tmp_path / "o.gif", lora_scale=1, **flags)) == 2
    assert "one number per LoRA (0), got 1" in capsys.readouterr().err


def test_serve_takes_the_same_weights(wan_folder: Path, tmp_path: Path) -> None:
    """LoRAs, steps, a size: what is served streams the frames of such a pipeline."""
    pytest.importorskip("fastapi")
    from safetensors.torch import save_file

    from aad1.serve.command import Serve, _app

    convert(wan_folder, tmp_path / "g.pt", "self-forcing")
    lora = tmp_path / "lora.safetensors"
    save_file({"diffusion_model.blocks.0.ffn.0.diff": torch.randn(48, 256)}, lora)
    threads = torch.get_num_threads()
    try:
        app = _app(Serve(model=str(tmp_path / "g.pt"), base=str(wan_folder), recipe="one-forcing",
                         steps=2, lora=(lora,), lora_scale=(0.5,), size="32x48", device="cpu",
                         threads=threads, weights="generator"))  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    facts, model = app.state.hub.facts, app.state.hub.engine.model
    assert (facts.width, facts.height) == (32, 48)
    pipe = Pipeline.from_pretrained(
        tmp_path / "g.pt", base=wan_folder, recipe="one-forcing", steps=2, loras=[(lora, 0.5)]
    )
    want = next(pipe.stream(None, "a cat", seed=3, size=(32, 48)))
    made = model.generate(model.begin(None, 3), model.encode("a cat")).frames
    assert made.shape == want.shape
    assert int(np.abs(made.astype(int) - want.numpy().astype(int)).max()) <= 1
    with pytest.raises(UserError, match="height 50 is not divisible by 16 .nearest 48 or 64"):
        _app(Serve(model=str(wan_folder), recipe="one-forcing", size="32x50"))
    with pytest.raises(UserError, match="one number per LoRA"):
        _app(Serve(lora=(lora,), lora_scale=(1.0, 2.0)))


def test_ctrl_c_finishes_an_endless_video(
    wan_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk in hand is finished and the file is whole; the handler is put back."""
    out = tmp_path / "out.mp4"
    wait, calls = Handover.wait, []

    def interrupted(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            assert not out.exists()  # under its name only when complete
            assert list(tmp_path.glob(".out.mp4.*"))
            signal.raise_signal(signal.SIGINT)
        return wait(self, *args)

    monkeypatch.setattr(Handover, "wait", interrupted)
    before = signal.getsignal(signal.SIGINT)
    flags = dict(recipe="one-forcing-frame", size="32x32", endless=True)
    assert run(*command(wan_folder, out, **flags)) == 0
    assert signal.getsignal(signal.SIGINT) is before
    text = capsys.readouterr()
    assert "9 frames, 3 chunks" in text.out and "finishing the file" in text.err
    assert len(read_video(out)) == 9
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_ctrl_c_twice_drops_the_video(
    wan_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    def interrupted(self: Any, *args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Handover, "wait", interrupted)
    flags = dict(recipe="one-forcing-frame", size="32x32", endless=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert run(*command(wan_folder, tmp_path / "out.mp4", **flags)) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags,message",
    [
        (dict(size="48"), "--size must be WIDTHxHEIGHT such as 832x480, got '48'"),
        (dict(size="0x16"), "got '0x16'"),
        (dict(size="50x32"), "width 50 is not divisible by 16 (nearest 48 or 64)"),
        (dict(seconds=0), "seconds must be above 0, got 0"),
        (dict(seconds=2, endless=True), "--endless and --seconds 2 exclude each other"),
        (dict(endless=True), "--endless needs a distilled model"),
        (dict(endless=True, out="o.gif"), "--endless writes .mp4 only"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(recipe="one-forcing", steps=3), "steps must be one of 1, 2, 4, got 3"),
        (dict(recipe="one-forcing", guidance=4), "--guidance is for teachers"),
        (dict(recipe="one-forcing", negative_prompt="x"), "--negative-prompt is for teachers"),
        (dict(recipe="aad1"), "give one (--image)"),
        (dict(recipe="magic"), "got 'magic'"),
        (dict(base="nowhere"), "no model 'nowhere'"),
    ],
)
def test_bad_flags_are_one_line_and_leave_no_file(
    wan_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, Any], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    flags = {"size": "32x32"} | flags
    assert run(*command(wan_folder, Path(flags.pop("out", "o.mp4")), **flags)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("aad1: ") and err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []
