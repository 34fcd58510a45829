"""The plumbing, end to end on the stand-in: right videos to right dimensions, and every failure."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from aad1 import cli
from aad1.errors import UserError
from aad1.media.mp4 import record
from aad1.media.reading import read_video
from aad1.vbench.drift import drift
from aad1.vbench.driver import Driver
from aad1.vbench.environment import Environment, JobFailed, code_version
from aad1.vbench.preflight import check_all, check_environment, check_weights
from aad1.vbench.protocol import DIMENSIONS, Pair, video_name
from aad1.vbench.results import BadResult, load_result, read_vbench
from vbench_standin import Bench, behave, calls, moving

Capture = pytest.CaptureFixture[str]
SMALL = ["dynamic_degree", "imaging_quality"]


def command(bench: Bench, what: str, *more: str) -> int:
    """Exit code of `aad1 vbench ...`."""
    places = bench.places
    words = [
        "vbench", what, "--vbench-root", places.root, "--python", sys.executable,
        "--cache", places.cache, "--torch-home", places.hub.parent, "--out", bench.out, *more,
    ]  # fmt: skip
    return cli.main([str(word) for word in words])


def report(bench: Bench) -> dict[str, Any]:
    return dict(json.loads((bench.out / "report.json").read_text()))


@functools.cache
def frames(path: Path) -> np.ndarray[Any, Any]:
    with av.open(str(path)) as container:
        pictures = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    return np.stack(pictures).astype(float)


def expected(bench: Bench, dimension: str, pairs: list[Pair]) -> float:
    """The stand-in's score, computed here from the files, in percent."""
    values = []
    for pair in pairs:
        for k in range(5):
            video = frames(bench.videos / video_name(pair.prompt, k))
            motion = np.abs(np.diff(video, axis=0)).mean()
            picture = Image.open(bench.places.images / pair.image).resize((128, 128))
            away = np.abs(video[0] - np.asarray(picture, float)).mean()
            values.append(
                {
                    "imaging_quality": video.mean() / 255,
                    "dynamic_degree": float(motion > 1),
                    "i2v_subject": 1 - away / 255,
                    "i2v_background": 1 - away / 255,
                }.get(dimension, 1 - motion / 255)
            )
    return 100 * float(np.mean(values))


def test_all_eight_dimensions_and_the_drift_run_once_each_in_their_own_process(
    bench: Bench, capsys: Capture
) -> None:
    (bench.out / "drift").mkdir()
    for k in range(2):
        with record(bench.out / "drift" / f"prompt {k}-0.mp4", 8.0) as encoder:
            encoder.write(moving(50 + k, frames=33).numpy())
    before = set(bench.videos.iterdir())
    assert command(bench, "run") == 0

    told = calls(bench.places.root)
    assert [c["dimension"] for c in told] == [*DIMENSIONS, "imaging_quality"]
    assert len({c["pid"] for c in told}) == 9
    assert {c["pythonpath"] for c in told} == {str(bench.places.root)}
    for call in told:
        mode = {"imaging_quality_preprocessing_mode": "longer"}
        assert call["kwargs"] == (mode if call["dimension"] == "imaging_quality" else {})

    scores = report(bench)["scores"]
    by_dimension = {
        n: [p for p in bench.pairs if n in p.dimensions] for n in DIMENSIONS
    }  # fmt: skip
    for name, pairs in by_dimension.items():
        assert scores[name]["videos"] == 5 * len(pairs)
        assert scores[name]["percent"] == pytest.approx(expected(bench, name, pairs), abs=1e-6)
    assert 0 < scores["dynamic_degree"]["percent"] < 100  # some moved, some did not

    # Drift, from the frames themselves: 4 whole seconds of 8 frames, population deviation.
    quality = [
        frames(bench.out / "drift" / f"prompt {k}-0.mp4")[:32].mean((1, 2, 3)) / 2.55
        for k in range(2)
    ]
    for seconds in (1, 2):
        each = [q.reshape(-1, 8 * seconds).mean(1).std() for q in quality]
        assert scores["drift"][f"{seconds}s"]["mean"] == pytest.approx(np.mean(each), rel=1e-6)
    assert "2 segments of 5 s" in scores["drift"]["5s"]

    text = capsys.readouterr().out
    assert (bench.out / "report.md").read_text().strip() in text
    own = next(line for line in text.splitlines() if line.startswith("| **this model**"))
    cells = [cell.strip() for cell in own.split("|")[3:11]]
    assert cells == [f"{scores[name]['percent']:.2f}" for name in DIMENSIONS]
    assert "not the published set: subject_consistency: 2 prompts, published 246" in text
    assert "AAD-1 after stage III" in text
    assert "not computed" not in text
    # Nothing was left in VBench's folder of videos, nor the pieces.
    assert set(bench.videos.iterdir()) == before
    assert not (bench.out / "drift-pieces").exists()

    assert command(bench, "run") == 0
    assert len(calls(bench.places.root)) == 9  # all kept
    assert report(bench)["scores"] == scores
    capsys.readouterr()
    assert cli.main(["vbench", "report", "--out", str(bench.out)]) == 0
    assert own in capsys.readouterr().out
    assert cli.main(["vbench", "report", "--out", str(bench.places.root)]) == 2


def test_a_changed_video_or_code_is_scored_again(bench: Bench) -> None:
    driver = Driver(bench.environment, bench.out)
    assert driver.score_set(bench.pairs, SMALL, bench.videos, 5) == {}
    assert driver.score_set(bench.pairs, SMALL, bench.videos, 5) == {}
    assert len(calls(bench.places.root)) == 2
    with record(bench.videos / "a dog runs-0.mp4", 8.0) as encoder:
        encoder.write(moving(99).numpy())
    driver.score_set(bench.pairs, SMALL, bench.videos, 5)
    assert len(calls(bench.places.root)) == 4
    with (bench.places.root / "vbench" / "compute.py").open("a") as file:
        file.write("# another version\n")
    driver.score_set(bench.pairs, SMALL[:1], bench.videos, 5)
    assert len(calls(bench.places.root)) == 5


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("crash", "exit code 1: RuntimeError: out of memory, says the stand-in"),
        ("die", "killed by SIGABRT"),
        ("nan", "1 of 15 videos scored NaN"),
        ("drop", "scored 14 videos, 15 were asked for"),
        ("percent", "not in [0, 1]"),
    ],
)
def test_a_dimension_that_fails_has_no_score_and_stops_no_other(
    bench: Bench, capsys: Capture, behaviour: str, says: str
) -> None:
    chosen = ["--dimensions", "aesthetic_quality", "imaging_quality", "i2v_subject"]
    behave(bench.places.root, **{behaviour: ["imaging_quality"]})
    assert command(bench, "run", *chosen) == 2
    out, err = capsys.readouterr()
    assert err.startswith("aad1: 1 of the scores were not computed (imaging_quality); ")
    assert says in err
    assert err.count("\n") == 1
    scores = report(bench)["scores"]
    assert set(scores["imaging_quality"]) == {"not_computed"}
    assert says in scores["imaging_quality"]["not_computed"]
    assert scores["i2v_subject"]["percent"] > 0
    assert scores["motion_smoothness"] == {"not_computed": "not run"}
    assert f"- imaging_quality: {scores['imaging_quality']['not_computed']}" in out

    behave(bench.places.root)  # mended: only this one is run again
    count = len(calls(bench.places.root))
    assert command(bench, "run", *chosen) == 0
    assert [c["dimension"] for c in calls(bench.places.root)[count:]] == ["imaging_quality"]
    assert report(bench)["scores"]["imaging_quality"]["videos"] == 15


def test_an_earlier_result_cannot_pass_for_that_of_a_run_that_failed(bench: Bench) -> None:
    driver = Driver(bench.environment, bench.out)
    assert driver.score_set(bench.pairs, SMALL, bench.videos, 5) == {}
    with record(bench.videos / "a dog runs-0.mp4", 8.0) as encoder:
        encoder.write(moving(99).numpy())
    behave(bench.places.root, crash=SMALL)
    assert set(driver.score_set(bench.pairs, SMALL, bench.videos, 5)) == set(SMALL)
    assert load_result(bench.out / "results" / "imaging_quality.json") is None


def test_every_missing_thing_is_listed_with_the_path_where_it_was_looked_for(
    bench: Bench, capsys: Capture
) -> None:
    places = bench.places
    gone = [path for name in DIMENSIONS for path in places.weights(name)]
    for path in set(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    image = places.images / "a dog runs.png"
    image.unlink()
    (bench.videos / "A cat sleeps.-3.mp4").unlink()
    (places.root / "vbench" / "aesthetic_quality.py").write_text("import not_there\n")
    behave(places.root, cuda=False)
    assert command(bench, "check") == 2
    out, err = capsys.readouterr()
    for path in set(gone):
        assert f"weight: {path}: missing, needed for " in out
    assert f"{places.hub}/checkpoints/dino_vitbase16_pretrain.pth: missing, needed for " \
        "subject_consistency, i2v_subject" in out  # fmt: skip
    assert f"image: {image}: missing" in out
    assert f"video: {bench.videos / 'A cat sleeps.-3.mp4'}: missing" in out
    assert "cannot import vbench.aesthetic_quality: ModuleNotFoundError: No module named " in out
    assert "sees no CUDA device" in out
    lines = out.splitlines()
    assert len(lines) == len(set(gone)) + 4
    assert f"{len(lines)} problems, listed above ({len(set(gone))} weight, 1 image, 1 video" in err

    assert command(bench, "run") == 2
    assert calls(places.root) == []  # refused before anything was scored
    assert not (bench.out / "report.json").exists()


def test_empty_files_folders_and_small_videos_are_problems_too(bench: Bench) -> None:
    lora = bench.places.root / "models" / "ensemble_lora"
    (lora / "adapter_model.bin").unlink()
    weights = bench.places.cache / "amt_model" / "amt-s.pth"
    weights.write_bytes(b"")
    found = [str(p) for p in check_weights(bench.places, DIMENSIONS)]
    assert found == [
        f"weight: {weights}: empty file, needed for motion_smoothness",
        f"weight: {lora}: empty folder, needed for i2v_background",
    ]
    for video in bench.videos.iterdir():
        with record(video, 8.0) as encoder:
            encoder.write(moving(0, side=96).numpy())
    args = (bench.environment, bench.pairs)
    for dimension, count in (("dynamic_degree", 1), ("imaging_quality", 0)):
        problems = check_all(*args, [dimension], bench.videos, 5)
        assert len(problems) == count, problems


def test_dreamsim_wants_cuda_whatever_the_device(bench: Bench) -> None:
    behave(bench.places.root, cuda=False)
    cpu = Environment(bench.places, Path(sys.executable), "cpu", bench.out / "work")
    assert [str(p) for p in check_environment(cpu, list(DIMENSIONS))] == [
        "environment: i2v_background needs CUDA, since VBench puts DreamSim there whatever the "
        "device"
    ]
    assert check_environment(cpu, ["i2v_subject"]) == []


def test_vbench_cannot_download(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wget that works stands in PATH; ours comes before it."""
    weights = bench.places.cache / "amt_model" / "amt-s.pth"
    weights.unlink()
    (tmp_path / "bin").mkdir()
    wget = tmp_path / "bin" / "wget"
    wget.write_text(f"#!/bin/sh\ntouch {weights}\n")
    wget.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wget.parent}{os.pathsep}{os.environ['PATH']}")
    failed = Driver(bench.environment, bench.out).score_set(
        bench.pairs, ["motion_smoothness"], bench.videos, 5
    )
    assert "non-zero exit status 1" in failed["motion_smoothness"]
    log = (bench.out / "work" / "logs" / "motion_smoothness.log").read_text()
    assert "refused by aad1: VBench tried to download: wget -P" in log
    assert not weights.exists()


def test_a_python_that_is_none_is_a_clear_line(bench: Bench, tmp_path: Path) -> None:
    nowhere = Environment(bench.places, tmp_path / "python", "cuda", bench.out / "work")
    with pytest.raises(UserError, match=r"--python .*python cannot be run: No such file"):
        check_environment(nowhere, SMALL)
    false = Environment(bench.places, Path("/bin/false"), "cuda", bench.out / "work")
    with pytest.raises(JobFailed, match="exit code 1: no output"):
        false.run({"do": "imports", "modules": []}, "x")


def test_results_of_another_form_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x_eval_results.json"
    with pytest.raises(BadResult, match=r"VBench wrote no x_eval_results\.json"):
        read_vbench(path, "i2v_subject", ["a-0.mp4"])
    row = {"video_path": "/somewhere/a-0.mp4", "video_results": 0.5}
    for text, says in (
        ("{", "not of VBench's form"),
        (json.dumps({"other": [0.5, [row]]}), "KeyError"),
        (json.dumps({"i2v_subject": [0.5, [row, row]]}), "scored 2 videos, 1 were asked for"),
        (json.dumps({"i2v_subject": [float("nan"), [row]]}), "the score is nan"),
    ):
        path.write_text(text)
        with pytest.raises(BadResult, match=says):
            read_vbench(path, "i2v_subject", ["a-0.mp4"])
    path.write_text(json.dumps({"i2v_subject": [0.5, [row]]}))
    assert read_vbench(path, "i2v_subject", ["a-0.mp4"]) == (0.5, {"a-0.mp4": 0.5})


def test_the_report_names_the_checkout_s_commit(bench: Bench) -> None:
    root = bench.places.root
    plain = code_version(root)
    assert plain["git_sha"] == "unknown"
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "vbench"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert code_version(root) == {**plain, "git_sha": head.stdout.strip()}
    with (root / "vbench" / "__init__.py").open("a") as file:
        file.write("# changed\n")
    changed = code_version(root)
    assert changed["git_sha"] == f"{head.stdout.strip()} (changed)"
    assert changed["python_files_sha256"] != plain["python_files_sha256"]
    inside = root / "inside"
    (inside / "vbench").mkdir(parents=True)
    assert code_version(inside)["git_sha"] == "unknown"


def test_drift_of_an_incomplete_set_is_refused(bench: Bench) -> None:
    driver = Driver(bench.environment, bench.out)
    with pytest.raises(UserError, match="holds no mp4"):
        driver.score_drift(bench.out / "drift")
    with record(bench.out / "drift" / "a-0.mp4", 8.0) as encoder:
        encoder.write(moving(0).numpy())
    with pytest.raises(UserError, match="a-0.mp4 has 5 frames, fewer than one piece of 8"):
        driver.score_drift(bench.out / "drift")
    assert not (bench.out / "drift-pieces").exists()
    with record(bench.out / "drift" / "b-0.mp4", 8.0) as encoder:
        encoder.write(moving(0, frames=9).numpy())
    with pytest.raises(UserError, match="the drift set is not complete: .*b-0.mp4: 128x128, 9"):
        driver.score_drift(bench.out / "drift")
    assert drift([1.0, 1.0], 1) == 0
    assert len(read_video(bench.out / "drift" / "b-0.mp4")) == 9
