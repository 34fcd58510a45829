"""The runner on tiny arms: what it writes, skips, resumes, refuses and records of failures."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aad1.data.shards import ClipShards, shard_name, write_manifest, write_shard
from aad1.errors import UserError
from aad1.evidence import bench, clock, gate, run
from aad1.evidence.__main__ import main
from aad1.evidence.arms import Arm, plan
from aad1.evidence.curves import curves, thinned
from aad1.evidence.measure import TINY, controls, evaluate_student, recorded_clips
from aad1.evidence.report import write
from aad1.evidence.results import Record, load, load_all
from aad1.evidence.run import Runner, Settings
from aad1.evidence.store import CUT_OFF, missing_data
from aad1.models.codec import PixelCodec
from aad1.train.config import LatentData
from aad1.train.guard import StopFlag
from aad1.train.loop import NonFinite
from aad1.train.run import Run
from aad1.worlds.sprites import SpritesConfig, draw

SOURCE = Path(__file__).parents[3] / "src"
ARMS = ("teacher-s0", "stage1-s0", "gate-stage2-s1000", "gate-C-s1000", "stage2-s0", "A-s0", "C-s0")


def tiny(names: tuple[str, ...]) -> list[Arm]:
    return [arm for arm in plan("evidence-tiny", 2, 2) if arm.name in names]


def runner(root: Path, names: tuple[str, ...] = ARMS, **settings: Any) -> Runner:
    standard: dict[str, Any] = dict(
        work=root / "work", results=root / "results", sizes=TINY, device="cpu",
        known_seconds=False, ignore_gate="a test",
    )  # fmt: skip
    return Runner(tiny(names), Settings(**standard | settings), plan("evidence-tiny", 2, 2))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, stages, gate, A and C of seed 0."""
    root = tmp_path_factory.mktemp("evidence")
    assert runner(root).run() == len(ARMS)
    return root


def test_each_run_leaves_one_small_record(done: Path) -> None:
    records = load_all([done / "results"])
    assert set(records) == {*ARMS, "controls-s0"}
    for name in ARMS:
        record = records[name]
        assert (record.status, record.error) == ("done", "")
        assert record.updates > 0 and record.train_seconds > 0 and len(record.weights) == 64
        m = record.value("short", "M")
        assert m is not None and math.isfinite(m)
        assert (done / "results" / f"{name}.json").stat().st_size < 30_000
    c = records["C-s0"]
    assert c.parent == "stage2-s0" and c.gate == "ignored: a test"
    assert [p[0] for p in c.curves["M"]] == [1, 2] and "heldout_gap" in c.curves
    assert "train/gap" in c.curves
    assert {"short", "long", "longest", "oracle", "diversity"} <= c.figures.keys()
    assert "longest" not in records["A-s0"].figures
    assert c.reasons["long/FDtd"] == "needs at least 16 videos, 4 are there"
    assert c.value("long", "FDtd") is None
    assert c.facts["seconds_per_chunk"] > 0
    assert (done / "results" / c.samples).stat().st_size > 1000
    still = records["controls-s0"].value("static/short", "M")
    assert still == pytest.approx(0, abs=1e-4)


def test_arms_of_a_seed_share_their_start_and_differ(done: Path) -> None:
    records = load_all([done / "results"])
    assert records["A-s0"].parent == records["C-s0"].parent
    assert records["A-s0"].weights != records["C-s0"].weights
    assert records["gate-C-s1000"].weights != records["C-s0"].weights


def test_only_what_later_runs_start_from_is_kept(done: Path) -> None:
    kept = {p.name.rsplit("-", 1)[0] for p in (done / "work" / "models").iterdir()}
    # Nothing starts from the gate's stage II any more.
    assert kept == {"teacher-s0", "stage1-s0", "stage2-s0"}
    assert not any((done / "work" / "runs").iterdir())


def test_finished_runs_are_skipped_and_a_cut_off_one_is_done_again(done: Path) -> None:
    path = done / "results" / "A-s0.json"
    before = path.read_bytes()
    assert runner(done).run() == 0
    path.unlink()
    junk = done / "work" / "runs" / "A-s0"
    junk.mkdir(parents=True)
    (junk / "log.jsonl").write_text('{"kind": "monitor", "update": 9, "seconds": 0, "M": 9.0}\n')
    assert runner(done).run() == 1
    old, new = json.loads(before), json.loads(path.read_bytes())
    assert old["figures"] == new["figures"] and old["curves"] == new["curves"]  # the same again


def test_weights_that_are_missing_are_made_again_and_results_stay(done: Path) -> None:
    results = {p: p.read_bytes() for p in (done / "results").glob("*.json")}
    shutil.rmtree(next((done / "work" / "models").glob("stage2-s0-*")))
    assert runner(done, (*ARMS, "D-s0")).run() == 1
    assert all(p.read_bytes() == content for p, content in results.items())
    assert load(done / "results" / "D-s0.json").status == "done"


def test_time_runs_out_before_a_run_not_within_it(tmp_path: Path, done: Path) -> None:
    some = runner(done, (*ARMS, "B-s0"), minutes=1e-6)
    assert some.run() == 0 and not (done / "results" / "B-s0.json").exists()
    guess = runner(tmp_path, minutes=0.5, known_seconds=True)
    teacher = guess.arms[0]
    guessed = guess.clock.estimate(teacher, {})
    assert guessed == pytest.approx(teacher.updates * clock.SECONDS["teacher"] + clock.AROUND)
    timed = Record(
        name="C-s0", arm="C", title="", group="", seed=0, status="done", updates=100,
        train_seconds=50.0, evaluate_seconds=10.0,
    )  # fmt: skip
    arm = with_updates(next(a for a in guess.arms if a.key == "A"), 200)
    assert guess.clock.estimate(arm, {"C-s0": timed}) == pytest.approx(1.1 * (100 + 10))


def test_a_run_that_meets_the_limit_goes_on_to_the_same_weights(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(Run):
        def _asked_to_stop(self) -> bool:
            self.asked = getattr(self, "asked", 0) + 1
            if self.asked == 3:
                self.stop.name = "the time limit"
            return super()._asked_to_stop()

    monkeypatch.setattr(run, "Run", Interrupted)
    one = runner(tmp_path, ARMS[:1])
    assert one.run() == 0
    assert "stopped by the time limit at update 2" in capsys.readouterr().out
    assert not list((tmp_path / "results").iterdir())
    marker = tmp_path / "work" / "runs" / "teacher-s0" / CUT_OFF
    identity, seconds = json.loads(marker.read_text())
    marker.write_text(json.dumps([identity, seconds + 1000]))
    monkeypatch.undo()
    assert runner(tmp_path, ARMS[:1]).run() == 1
    record = load(tmp_path / "results" / "teacher-s0.json")
    assert record.weights == load(done / "results" / "teacher-s0.json").weights
    assert record.train_seconds > 1000


def test_a_run_that_was_killed_while_measured_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(bench, "evaluate_teacher", kill)
    with pytest.raises(Killed):
        runner(tmp_path, ARMS[:1]).run()
    monkeypatch.undo()
    log = (tmp_path / "work" / "runs" / "teacher-s0" / "log.jsonl").read_text()
    monkeypatch.setattr("aad1.train.loop.Trainer.step", kill)
    assert runner(tmp_path, ARMS[:1]).run() == 1
    record = load(tmp_path / "results" / "teacher-s0.json")
    assert record.status == "done" and record.train_seconds > 0.05
    assert log.count('"train"') > 0


def test_the_limit_is_told_to_the_run_in_time(tmp_path: Path) -> None:
    one = runner(tmp_path, minutes=clock.AROUND / 60)

    class Asked:
        stop = StopFlag()

    with one.clock.until_the_limit(Asked.stop, {}):
        time.sleep(1.3)  # the timer waits a second at least
    assert Asked.stop.name == "the time limit"
    stop = StopFlag()
    with runner(tmp_path).clock.until_the_limit(stop, {}):
        pass
    assert stop.name == ""


def with_updates(arm: Arm, updates: int) -> Arm:
    optim = replace(arm.experiment.optim, updates=updates)
    return replace(arm, experiment=replace(arm.experiment, optim=optim))


def test_only_the_first_run_of_a_call_begins_without_the_time_to_end(tmp_path: Path) -> None:
    one = runner(tmp_path, minutes=2, known_seconds=True)
    teacher = next(a for a in one.arms if a.key == "teacher")
    one.clock.check([with_updates(teacher, 6000)], {}, first=True)  # 525 s: never, otherwise
    one.clock.check([with_updates(teacher, 500)], {}, first=False)  # 85 s
    with pytest.raises(clock.OutOfTime, match="teacher-s0 needs about 165 s"):
        one.clock.check([with_updates(teacher, 1500)], {}, first=False)
    with pytest.raises(clock.OutOfTime):  # weights that have to be made again count
        one.clock.check([with_updates(teacher, 500)] * 2, {}, first=False)
    short = runner(tmp_path, minutes=1, known_seconds=True)
    with pytest.raises(clock.OutOfTime):
        short.clock.check([with_updates(teacher, 6000)], {}, first=True)


def test_a_call_on_a_fresh_machine_goes_on_from_weights_and_results_alone(
    done: Path, tmp_path: Path
) -> None:
    shutil.copytree(done / "results", tmp_path / "results")
    shutil.copytree(done / "work" / "models", tmp_path / "work" / "models")
    before = {p: p.read_bytes() for p in (tmp_path / "results").glob("*.json")}
    assert runner(tmp_path, (*ARMS, "B-s0")).run() == 1
    assert all(p.read_bytes() == content for p, content in before.items())  # nothing twice
    records = load_all([tmp_path / "results"])
    assert records["B-s0"].start == records["C-s0"].start == records["stage2-s0"].weights


def test_what_starts_from_a_diverged_run_is_left_out(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done, tmp_path / "copy")
    root = tmp_path / "copy"
    ill = load(root / "results" / "stage2-s0.json")
    replace(ill, status="diverged").save(root / "results")
    shutil.rmtree(next((root / "work" / "models").glob("stage2-s0-*")))
    assert runner(root, ("B-s0", "D-s0")).run() == 0  # and stage II is not trained again
    assert "B-s0: cannot begin, stage2-s0 diverged" in capsys.readouterr().out


def test_a_run_that_diverges_is_a_result_and_one_that_fails_is_tried_again(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks:
        error: Exception = NonFinite("update 3: the critic's loss is nan")

        def __init__(self, experiment: Any) -> None:
            self.folder, self.stop = experiment.folder, StopFlag()

        def train(self) -> Path:
            self.folder.mkdir(parents=True)
            line = {"kind": "monitor", "update": 1, "seconds": 0.1, "M": 0.5}
            (self.folder / "log.jsonl").write_text(json.dumps(line) + "\n")
            raise self.error

    monkeypatch.setattr(run, "Run", Breaks)
    assert runner(done, (*ARMS, "weight_0-s0")).run() == 1
    record = load(done / "results" / "weight_0-s0.json")
    assert record.status == "diverged" and "loss is nan" in record.error
    assert record.curves == {"M": [[1, 0.5]]} and record.figures == {}
    assert runner(done, (*ARMS, "weight_0-s0")).run() == 0
    Breaks.error = RuntimeError("CUDA out of memory")
    assert runner(done, (*ARMS, "weight_5-s0")).run() == 1
    assert load(done / "results" / "weight_5-s0.json").status == "failed"
    monkeypatch.undo()
    assert runner(done, (*ARMS, "weight_5-s0")).run() == 1
    again = load(done / "results" / "weight_5-s0.json")
    assert again.status == "done"
    assert again.earlier == ("RuntimeError: CUDA out of memory",)


def record(name: str, **figures: float) -> Record:
    arm, seed = name.rsplit("-s", 1)
    return Record(
        name=name, arm=arm, title="", group="gate", seed=int(seed), status="done",
        figures={"short": figures},
    )  # fmt: skip


def test_the_gate() -> None:
    start = record("gate-stage2-s1000", M=1.0, FDtd=7.0, FDnss_late=12.0)
    good = record("gate-C-s1000", M=0.95, FDtd=5.0, FDnss_late=9.0)
    assert gate.judge(start, good, None, None, "x")["passed"]
    for changes in ({"M": 0.85}, {"M": 1.2}, {"FDtd": 7.5}, {"FDnss_late": 12.0}):
        bad = replace(good, figures={"short": dict(good.figures["short"]) | changes})
        assert not gate.judge(start, bad, None, None, "x")["passed"], changes
    lacking = replace(good, figures={"short": {"M": 1.0, "FDtd": 1.0}})
    assert not gate.judge(start, lacking, None, None, "x")["passed"]
    teacher = replace(record("teacher-s0"), figures={"validation": {"M": 0.8, "FDnss_late": 9.0}})
    floor = replace(record("c-s0"), figures={"validation real/short": {"FDnss_late": 0.2}})
    found = gate.judge(start, good, teacher, floor, "x")
    assert found["passed"] and len(found["warnings"]) == 2


def test_no_arm_runs_before_the_gate(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done, tmp_path / "copy")
    root = tmp_path / "copy"
    for path in (root / "results").glob("*.json"):
        if path.stem not in ARMS[:4] and path.stem != "controls-s0":
            path.unlink()
    (root / "results" / gate.FILE).unlink(missing_ok=True)
    closed = runner(root, ignore_gate="")
    closed.run()
    printed = capsys.readouterr().out
    found = gate.read(root / "results")
    assert found is not None and found["settings"] == closed.settings_hash
    if not found["passed"]:
        assert "the gate is closed" in printed and not (root / "results" / "A-s0.json").exists()
    gate.write(found | {"passed": True}, root / "results")
    assert runner(root, ARMS[:5], ignore_gate="").run() == 1
    assert load(root / "results" / "stage2-s0.json").gate == "passed"
    # Settings that change before any ablation put results aside; after one they are refused.
    changed = plan("evidence-tiny", 2, 2)
    assert main(["--tiny", "--results", str(root / "results"), "--work", str(root / "work"),
                 "--arms", "A-s7"]) == 2  # fmt: skip
    assert "no run 'A-s7'" in capsys.readouterr().err
    number = next(i for i, a in enumerate(changed) if a.key == "gate-C")
    e = changed[number].experiment
    changed[number] = replace(
        changed[number], experiment=replace(e, optim=replace(e.optim, lr=3e-4))
    )
    other = Runner([changed[number]], closed.settings, changed)
    with pytest.raises(UserError, match="stage2-s0 was run with those"):
        other.run()
    (root / "results" / "stage2-s0.json").unlink()
    assert other.run() == 1
    kept = [load(p) for p in (root / "results").glob("gate-C-*-s1000.json")]
    assert len(kept) == 1
    samples = [root / "results" / r.samples for r in (*kept, load_all([root / "results"])[ARMS[3]])]
    assert all(path.is_file() for path in samples) and samples[0] != samples[1]


def test_curves_are_read_and_thinned(tmp_path: Path) -> None:
    lines = [
        {"kind": "train", "update": 10, "seconds": 1.0, "gap": 0.123456, "other": 1.0},
        {"kind": "monitor", "update": 20, "seconds": 1.0, "M": 0.98765, "FDtd": math.inf},
        {"kind": "final", "update": 20, "seconds": 2.0, "M": 0.5},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert curves(tmp_path) == {"train/gap": [[10, 0.1235]], "M": [[20, 0.9877]]}
    assert curves(tmp_path / "none") == {}
    points = [[float(i), 0.0] for i in range(500)]
    few = thinned(points)
    assert len(few) <= 60 and few[-1] == points[-1]


def test_it_needs_nothing_that_a_training_machine_lacks(tmp_path: Path) -> None:
    """Only torch, numpy, safetensors, pillow and pyyaml: a run with all else taken away."""
    code = (
        "import sys\n"
        "for name in ('tyro', 'rich', 'av', 'diffusers', 'transformers', 'scipy', 'tensorboard',"
        " 'huggingface_hub', 'vizdoom', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from aad1.evidence.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    options = ["--tiny", "--groups", "teacher", "--results", "results", "--work", "work"]
    found = subprocess.run(
        [sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=300,
        check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    records = load_all([tmp_path / "results"])
    assert {r.status for r in records.values()} == {"done"}
    assert records.keys() == {"teacher-s0", "stage1-s0", "controls-s0"}


def test_torch_is_left_as_it_was(done: Path) -> None:
    from aad1.models.dit import Block
    from aad1.train.blocks import compile_blocks, plain_blocks

    plain = Block.forward
    compile_blocks()
    assert Block.forward is not plain
    plain_blocks()
    assert Block.forward is plain and not torch.is_autocast_enabled("cpu")


def latent_world(root: Path) -> LatentData:
    """Encoded clips of sprites in the place of doom's: 100 held-out ones."""
    codec = PixelCodec(4)
    codec.save_pretrained(root / "codec")
    for split, count in (("train", 4), ("heldout", 100)):
        clips, _ = draw(SpritesConfig(size=16, frames=9), count, seed=len(split))
        latents = codec.encode(clips.video).half().numpy()
        write_shard(root / split / shard_name(0), latents, clips.captions, tensor="latents")
        write_manifest(root / split, world="doom", split=split, seed=0, config={},
                       tensor="latents", shards=[(shard_name(0), count)])  # fmt: skip
    return LatentData(train=root / "train", heldout=root / "heldout", codec=root / "codec")


def test_recorded_clips_are_judged_too(tmp_path: Path, tiny_pipeline: Callable[..., Any]) -> None:
    data = latent_world(tmp_path)
    real = recorded_clips(data, TINY, torch.device("cpu"))
    assert len(real.video) == 16 and real.state is None and real.frames == 9
    shards = ClipShards(data.heldout)
    # Those that the monitor watches are left out, and the floor's are others.
    torch.testing.assert_close(real.first, shards.tensors(range(64, 80)).float()[:, :, :1])
    assert torch.equal(real.draw("short", "clip"), real.video)
    assert not torch.equal(real.draw("short", "other"), real.video)
    pipe = tiny_pipeline()
    pipe.text = Words()
    figures, reasons, shown = evaluate_student(pipe, real, TINY, longest=True)
    assert figures.keys() == {"short", "last"} and len(shown) == 16
    assert figures["short"]["M"] is not None and figures["last"]["M"] is not None
    assert "sees more than 9 frames" in reasons["short/FD_motion"]
    found = controls(real, TINY)
    assert found["static"]["short"]["M"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(UserError, match="96 are needed"):
        recorded_clips(replace(data, heldout=data.train), TINY, torch.device("cpu"))


def test_what_cannot_be_is_told_before_a_run_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--tiny", "--groups", "teacher", "--work", str(tmp_path / "work")]
    if not torch.cuda.is_available():
        results = tmp_path / "results"
        assert main([*given, "--results", str(results), "--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err and not list(results.iterdir())
    (tmp_path / "file").touch()
    assert main([*given, "--results", str(tmp_path / "file" / "results")]) == 2
    assert "cannot make the folder" in capsys.readouterr().err


class Words:
    dim = 8

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        return torch.stack([torch.full((4, 8), len(p) / 40) for p in prompts])


def test_runs_without_their_data_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arms = [arm for arm in plan() if arm.group == "doom"]
    assert all(missing_data(arm) == "out/data/doom-latents" for arm in arms)
    settings = Settings(
        work=tmp_path / "work", results=tmp_path / "results", ignore_gate="a test", device="cpu"
    )
    assert Runner(arms, settings).run() == 0
    assert "doom_C-s1: no data" in capsys.readouterr().out


@pytest.mark.slow
def test_every_kind_of_arm_runs_and_is_reported(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "copy")
    root = tmp_path / "copy"
    kinds = (
        "B", "D", "no_warmup", "no_warmup_compute", "joint", "joint_compute", "weight_200",
        "stage1_four_steps", "stage2_four_steps", "four_steps", "stage1_two_steps",
        "stage2_two_steps", "two_steps", "long_rollout",
    )  # fmt: skip
    names = (*ARMS, *(f"{key}-s0" for key in kinds))
    runner(root, names).run()
    records = load_all([root / "results"])
    for name in names:
        assert records[name].status == "done", records[name].error
    joint = records["joint-s0"]
    assert {"train/gap", "train/fake", "heldout_gap", "M"} <= joint.curves.keys()
    assert records["four_steps-s0"].settings["sigmas"] == [1.0, 0.9375, 0.8333333333333334, 0.625]
    assert "longest" in records["long_rollout-s0"].figures
    assert records["no_warmup-s0"].updates == 4
    write(root / "results", root / "evidence.md", "evidence-tiny")
    text = (root / "evidence.md").read_text()
    assert "| joint, seed 0 |" in text and "reproduced" not in text
    assert (root / "results" / "curves-warm-up-heldout_gap.svg").exists()
