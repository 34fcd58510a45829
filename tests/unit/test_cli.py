"""The command line, called as a function: what it writes, and how it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import aad1
from aad1 import cli, model_names
from aad1.fast.handover import Handover
from aad1.media.reading import read_video
from aad1.model_info import INDEX, read_info
from aad1.models import text as text_module
from aad1.models.weights import WEIGHTS
from aad1.pipeline import Pipeline

Build = Callable[..., Pipeline]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _restore_warnings() -> Iterator[None]:
    """The command line sets how warnings look, for its own process."""
    form, given = warnings.formatwarning, set(text_module._warned)
    text_module._warned.clear()
    yield
    warnings.formatwarning = form
    text_module._warned.update(given)


@pytest.fixture
def model(tiny_pipeline: Build, tmp_path: Path) -> Path:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "frame.png"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(*words: object) -> int:
    """Exit code of `aad1 words...`, however it ends."""
    try:
        return cli.main([str(w) for w in words])
    except SystemExit as end:
        return int(end.code or 0)


def refused(capsys: Capture, *words: object, code: int = 2) -> str:
    """The one line on stderr of a command that must fail."""
    capsys.readouterr()
    assert run(*words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("aad1: ")
    assert err.count("\n") == 1, err
    return err


# -- generate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_generate_writes_a_video_and_prints_the_speed(
    model: Path, picture: Path, tmp_path: Path, capsys: Capture, suffix: str
) -> None:
    out = tmp_path / "videos" / f"out{suffix}"
    out.parent.mkdir()
    command = ("generate", "--model", model, "--image", picture, "--prompt", "red disc",
               "--chunks", 3, "--out", out)  # fmt: skip
    assert run(*command) == 0
    text = capsys.readouterr().out
    assert "13 frames, 3 chunks" in text
    assert "chunks/s" in text and "frames/s with decode" in text and "without" in text
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    if suffix == ".mp4":
        assert len(read_video(out)) == 13
    else:
        with Image.open(out) as written:
            assert getattr(written, "n_frames", 1) == (13 if suffix == ".gif" else 1)


def test_the_written_frames_are_those_of_the_pipeline(
    model: Path, picture: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gif"
    run("generate", "--model", model, "--image", picture, "--prompt", "left", "--chunks", 2,
        "--seed", 7, "--scale", 1, "--out", out)  # fmt: skip
    want = Pipeline.from_pretrained(model)(picture, "left", num_chunks=2, seed=7)
    with Image.open(out) as gif:
        first = np.asarray(gif.convert("RGB")).astype(int)
        gif.seek(8)
        last = np.asarray(gif.convert("RGB")).astype(int)
    # a gif has 256 colours: near, and nearer to its own frame than to another
    for got, own, other in ((first, want[0], want[8]), (last, want[8], want[0])):
        near = np.abs(got - own.numpy()).mean()
        assert near < 0.5 * np.abs(got - other.numpy()).mean()


def bad_inputs(
    model: Path, picture: Path, folder: Path
) -> dict[str, tuple[dict[str, object], str]]:
    empty, text, cut = folder / "empty.png", folder / "text.png", folder / "cut.png"
    empty.touch()
    text.write_text("hello")
    cut.write_bytes(picture.read_bytes()[:200])
    return {
        "zero chunks": ({"--chunks": 0}, "--chunks must be at least 1, got 0"),
        "negative chunks": ({"--chunks": -2}, "--chunks must be at least 1, got -2"),
        "missing image": ({"--image": folder / "no.png"}, "no.png does not exist"),
        "empty image": ({"--image": empty}, "empty.png is empty"),
        "text as image": ({"--image": text}, "text.png is not an image"),
        "truncated image": ({"--image": cut}, "cut.png"),
        "folder as image": ({"--image": folder}, "is a folder"),
        "unknown model": ({"--model": "dooom"}, "did you mean 'doom'?"),
        "folder without a model": ({"--model": folder}, "has no model_index.json"),
        "wrong extension": ({"--out": folder / "out.avi"}, "must end in one of"),
        "no extension": ({"--out": folder / "out"}, "must end in one of"),
        "negative scale": ({"--scale": -1}, "--scale must be at least 0, got -1"),
        "unknown device": ({"--device": "tpu"}, "auto, cpu, cuda or mps, got 'tpu'"),
    }


@pytest.mark.parametrize("case", [
    "zero chunks", "negative chunks", "missing image", "empty image", "text as image",
    "truncated image", "folder as image", "unknown model", "folder without a model",
    "wrong extension", "no extension", "negative scale", "unknown device",
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_no_file(
    model: Path, picture: Path, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch, case: str,
) -> None:  # fmt: skip
    packaged = tmp_path / "packaged"
    (packaged / "doom").mkdir(parents=True)
    (packaged / "doom" / INDEX).write_text("{}")
    monkeypatch.setattr(model_names, "PACKAGED", packaged)
    work = tmp_path / "work"
    work.mkdir()
    changes, message = bad_inputs(model, picture, work)[case]
    out = work / "out.mp4"
    flags = {"--model": model, "--image": picture, "--chunks": 2, "--out": out} | changes
    before = sorted(work.iterdir())
    err = refused(capsys, "generate", *(word for pair in flags.items() for word in pair))
    assert message in err
    assert sorted(work.iterdir()) == before


def test_without_cuda_nothing_is_begun(
    model: Path, picture: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "out.mp4"
    flags = ("--model", model, "--image", picture, "--out", out)
    assert "no CUDA device is available" in refused(capsys, "generate", *flags, "--device", "cuda")
    err = refused(capsys, "generate", *flags, "--device", "cpu", "--offload")
    assert "offload is for CUDA devices" in err
    assert not out.exists()
    assert run("generate", *flags, "--device", "auto", "--chunks", 1) == 0


def test_a_decoder_of_another_models_latents_is_one_line(
    model: Path, picture: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out.mp4"
    err = refused(capsys, "generate", "--model", model, "--image", picture, "--out", out,
                  "--decoder", tmp_path / "tiny.pth")  # fmt: skip
    assert "a tiny decoder is for Wan 2.1's latents" in err and not out.exists()


def test_a_damaged_model_is_one_line_and_leaves_no_file(
    model: Path, picture: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = model / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-64])
    out = tmp_path / "out.mp4"
    err = refused(capsys, "generate", "--model", model, "--image", picture, "--out", out)
    assert f"{WEIGHTS} is truncated" in err
    assert not out.exists()


def test_a_teacher_is_refused(
    tiny_pipeline: Build, picture: Path, tmp_path: Path, capsys: Capture
) -> None:
    tiny_pipeline("teacher").save_pretrained(tmp_path / "teacher")
    out = tmp_path / "out.mp4"
    err = refused(capsys, "generate", "--model", tmp_path / "teacher", "--image", picture,
                  "--out", out)  # fmt: skip
    assert "bidirectional teacher" in err
    assert not out.exists()


def test_a_failure_half_way_leaves_the_old_video(
    model: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.mp4"
    out.write_bytes(b"old")
    wait, calls = Handover.wait, []

    def failing(self: object, *args: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return wait(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Handover, "wait", failing)
    assert run("generate", "--model", model, "--image", picture, "--out", out) == 130
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["frame.png", "model", "out.mp4"]


def test_unknown_words_give_one_clean_line(model: Path, picture: Path, tmp_path: Path) -> None:
    """In a process of its own: pytest would swallow the warning."""
    command = [sys.executable, "-m", "aad1.cli", "generate", "--model", model, "--image", picture,
               "--prompt", "gallop left", "--chunks", 2, "--out", tmp_path / "o.gif"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(aad1.__file__).parents[1])}
    done = subprocess.run(
        [str(w) for w in command], capture_output=True, text=True, check=True, env=environment
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("aad1: left out of the prompt: gallop")
    assert "disc, left, moves, red, right" in line


@pytest.mark.parametrize("prompt", ["", "red disc moves left " * 2000, "\x00\U0001f600 ¿?"])
def test_any_prompt_works(model: Path, picture: Path, tmp_path: Path, prompt: str) -> None:
    out = tmp_path / "out.gif"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = run("generate", "--model", model, "--image", picture, "--prompt", prompt,
                   "--chunks", 1, "--out", out)  # fmt: skip
    assert code == 0
    assert out.exists()


# -- the rest -------------------------------------------------------------------------------------


def test_a_gpu_without_memory_is_one_line(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.\nmore"
        )

    monkeypatch.setitem(cli.RUN, cli.Generate, full)
    assert cli.main(["generate", "--out", str(tmp_path / "o.mp4")]) == 1
    out, err = capsys.readouterr()
    assert err == (
        "aad1: CUDA out of memory. Tried to allocate 2.00 GiB; a smaller --size takes less, or "
        "--offload\n"
    )
    assert out == ""

    def bug(*_: object) -> None:
        raise RuntimeError("of another kind")

    monkeypatch.setitem(cli.RUN, cli.Generate, bug)
    with pytest.raises(RuntimeError, match="of another kind"):
        cli.main(["generate"])


def test_without_arguments_it_prints_help(capsys: Capture) -> None:
    assert run() == 0
    text = capsys.readouterr().out
    for name in ("generate", "train", "data", "encode", "export"):
        assert name in text


def test_version(capsys: Capture) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"aad1 {aad1.__version__}\n"


@pytest.mark.parametrize(
    "words,named",
    [
        (("bogus",), "bogus"),
        (("generate", "--image", "x.png", "--chunk", "3"), "--chunk"),
        (("generate",), "--image"),
        (("generate", "--image", "x.png", "--chunks", "many"), "--chunks"),
        (("train", "sprites-tiny-dmd", "--optim.momentum", "1"), "--optim.momentum"),
        (("train", "sprites-tiny-dmd", "--stage.penalty-weight", "1"), "--stage.penalty-weight"),
    ],
)
def test_wrong_flags_are_named_and_exit_with_2(
    capsys: Capture, words: tuple[str, ...], named: str
) -> None:
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert named in err
    assert "Traceback" not in out + err


def test_train_lists_presets(capsys: Capture) -> None:
    for words in (("train",), ("train", "--show")):
        assert run(*words) == 0
        text = capsys.readouterr().out
        assert "sprites-tiny-dmd" in text and "doom-aad" in text
        assert "DmdConfig, 40 updates" in text


def test_an_unknown_preset_suggests_the_nearest(capsys: Capture) -> None:
    assert "did you mean 'sprites-tiny-dmd'" in refused(capsys, "train", "sprites-tiny-dmdd")
    assert "nothing.yaml does not exist" in refused(capsys, "train", "nothing.yaml")


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--optim.batch", "0"), "optim.batch must be at least 1, got 0"),
        (("--geometry.window", "2"), "window must be at least sink + chunk = 5 frames, got 2"),
        (("--stage.max-sigma", "3"), "got 0.02, 3.0"),
    ],
)
def test_impossible_overrides_are_refused(
    capsys: Capture, flags: tuple[str, ...], message: str
) -> None:
    assert run("train", "sprites-tiny-dmd", *flags) == 2
    err = capsys.readouterr().err
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_a_stage_without_its_teacher_is_refused(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    err = refused(capsys, "train", "sprites-tiny-ode", "--device", "cpu")
    assert "sprites-tiny-teacher/final" in err
    assert list(tmp_path.iterdir()) == []


def test_export_halves_the_weights_and_keeps_the_facts(
    model: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert run("export", model, "--out", tmp_path / "small") == 0
    assert "MiB" in capsys.readouterr().out
    assert read_info(tmp_path / "small") == read_info(model)
    sizes = [(tmp_path / n / "transformer" / WEIGHTS).stat().st_size for n in ("small", "model")]
    assert sizes[0] < 0.6 * sizes[1]
    refused(capsys, "export", tmp_path / "nowhere", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_sprites_data_has_21_frames_unless_told(tmp_path: Path, capsys: Capture) -> None:
    from aad1.data.shards import ClipShards

    assert run("data", "sprites", "--out", tmp_path / "a", "--clips", 2, "--size", 32) == 0
    assert ClipShards(tmp_path / "a").clip_shape[0] == 21
    assert (tmp_path / "a" / "preview.png").exists()
    assert "got 0" in refused(capsys, "data", "sprites", "--out", tmp_path / "b", "--clips", 0)
    assert "'mars'" in refused(capsys, "data", "mars", "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_threads_do_not_spin_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    cli.main(["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    cli.main(["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == "active"
