"""Whole runs of two updates: the chain of parents, resuming, early stop, and refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aad1.device import pick_device
from aad1.errors import UserError
from aad1.model_info import INDEX, weights_hash
from aad1.models.discriminator import DiscriminatorConfig
from aad1.models.dit import WanConfig
from aad1.pipeline import Pipeline
from aad1.presets import preset
from aad1.train import checkpoint
from aad1.train.config import Experiment, MonitorConfig
from aad1.train.log import RunLog
from aad1.train.monitor import Validation
from aad1.train.record import read_record
from aad1.train.run import Run

STAGES = ("teacher", "ode", "dmd", "aad")
PARENT = {"ode": "teacher", "dmd": "ode", "aad": "dmd"}
MODEL = WanConfig(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=2, text_dim=16,
    freq_dim=32, rope_theta=100.0, prediction="x0",
)  # fmt: skip


def experiment(stage: str, out: Path, **changes: Any) -> Experiment:
    """sprites-tiny-<stage>, smaller still: two updates of four clips."""
    e = preset(f"sprites-tiny-{stage}")
    optim = replace(e.optim, **({"updates": 2, "batch": 4, "lr": 1e-3} | changes.pop("optim", {})))
    folders = {}
    if stage != "teacher":
        folders["teacher"] = out / "sprites-tiny-teacher" / "final"
        folders["init"] = out / f"sprites-tiny-{PARENT[stage]}" / "final"
    early = e.monitor.early_stop
    standard: dict[str, Any] = dict(
        model=MODEL, optim=optim, out=out, device="cpu", log_every=1,
        discriminator=DiscriminatorConfig(taps=(0, 1)),
        trajectories=replace(e.trajectories, clips=4, steps=4, batch=4),
        monitor=MonitorConfig(every=1, clips=2, early_stop=early),
    )  # fmt: skip
    return replace(e, **(standard | folders | changes))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """out/ of all four stages, trained once for this file."""
    out = tmp_path_factory.mktemp("out")
    for stage in STAGES:
        torch.manual_seed(0)
        Run(experiment(stage, out)).train()
    return out


def final(out: Path, stage: str) -> Path:
    return out / f"sprites-tiny-{stage}" / "final"


def index(out: Path, stage: str) -> dict[str, Any]:
    data = json.loads((final(out, stage) / INDEX).read_text())
    assert isinstance(data, dict)
    return data


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_names_its_parent_and_moved_the_weights(chain: Path, stage: str) -> None:
    facts = index(chain, stage)
    assert facts["stage"] == stage
    assert facts["updates"] == 2
    pipe = Pipeline.from_pretrained(final(chain, stage))
    assert facts["sha256"] == weights_hash(pipe.transformer)
    if stage == "teacher":
        assert facts["parent"] is None
        return
    before = index(chain, PARENT[stage])
    assert facts["parent"] == {k: before[k] for k in ("stage", "updates", "sha256", "parent")}
    assert facts["sha256"] != before["sha256"]
    old = Pipeline.from_pretrained(final(chain, PARENT[stage])).transformer.state_dict()
    moved = [n for n, p in pipe.transformer.state_dict().items() if not torch.equal(p, old[n])]
    assert "blocks.0.attn1.to_q.weight" in moved and "proj_out.weight" in moved
    # the teacher's prompt encoder goes through unchanged
    assert weights_hash(pipe.text) == weights_hash(
        Pipeline.from_pretrained(final(chain, "teacher")).text
    )


@pytest.mark.parametrize("stage", ["ode", "dmd", "aad"])
def test_what_comes_out_generates(chain: Path, stage: str) -> None:
    pipe = Pipeline.from_pretrained(final(chain, stage))
    video = pipe(np.zeros((32, 32, 3), np.uint8), "red circle moves left", num_chunks=2)
    assert video.shape == (9, 32, 32, 3)


def test_a_teacher_learns_its_prompt_encoder(tmp_path: Path) -> None:
    # Its output layers start at zero, so the prompts' first gradient comes after some updates.
    run = Run(experiment("teacher", tmp_path, optim={"updates": 6, "warmup": 0, "ema": 0.0}))
    before = {n: p.detach().clone() for n, p in run.setup.text.named_parameters()}
    trained = Pipeline.from_pretrained(run.train()).text
    for name, p in trained.named_parameters():
        assert float((p - before[name]).abs().max()) > 1e-4, name


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_leaves_its_record_log_and_samples(chain: Path, stage: str) -> None:
    folder = chain / f"sprites-tiny-{stage}"
    assert read_record(folder / "config.yaml") == experiment(stage, chain)
    lines = read_log(folder)
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["update"] for line in train] == [1, 2]
    assert all(line["clips_per_s"] > 0 and line["data_wait_s"] >= 0 for line in train)
    assert all(np.isfinite(v) for line in train for v in line.values() if isinstance(v, float))
    watched = [line for line in lines if line["kind"] == "monitor"]
    assert len(watched) == (2 if stage in ("dmd", "aad") else 0)
    assert all(line["M"] >= 0 for line in watched)
    (last,) = [line for line in lines if line["kind"] == "final"]
    assert last["update"] == 2 and last["M"] >= 0
    assert (folder / "samples" / "update-000002.png").exists()
    assert any((folder / "tensorboard").iterdir())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stage", ["teacher", "dmd", "aad"])
def test_an_interrupted_run_ends_with_the_weights_of_a_straight_one(
    chain: Path, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str) -> Experiment:
        e = experiment(stage, chain, optim={"updates": 4}, checkpoint_every=2,
                       monitor=MonitorConfig(every=0, clips=2))  # fmt: skip
        return replace(e, out=tmp_path / name)

    straight = Run(make("straight")).train()

    plain = RunLog.advance

    def stop(self: RunLog, update: int) -> None:
        plain(self, update)
        if update == 3:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "advance", stop)
        with pytest.raises(Interrupted):
            Run(make("broken")).train()
    folder = make("broken").folder
    assert not (folder / "final").exists()
    assert [p.name for p in checkpoint.steps(folder)] == ["step-000002"]
    torch.manual_seed(123)
    resumed = Run(make("broken")).train()
    facts = [json.loads((f / INDEX).read_text()) for f in (straight, resumed)]
    assert facts[0]["sha256"] == facts[1]["sha256"]
    assert facts[0] == facts[1]
    logged = [line["update"] for line in read_log(folder) if line["kind"] == "train"]
    assert logged in ([1, 2, 3, 4], [1, 2, 3, 3, 4])  # update 3 was made twice


def test_a_checkpoint_of_another_parent_is_refused(chain: Path, tmp_path: Path) -> None:
    e = replace(experiment("dmd", chain, optim={"updates": 3}, checkpoint_every=1), out=tmp_path)
    Run(e).train()
    with pytest.raises(
        UserError, match=r"step-000003 is another run's \(parent: \w+ -> \w{64}\): "
    ):
        Run(replace(e, init=final(chain, "teacher"))).train()
    other = replace(e, model=replace(e.model, ffn_dim=8))  # only what differs is told
    with pytest.raises(UserError, match=r"another run's \(model.ffn_dim: \d+ -> 8\): remove"):
        Run(other).train()
    # ... and a truncated one by its name
    (shard,) = tmp_path.glob("*/checkpoints/*/weights/*.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"step-000003.weights.__0_0\.distcp is truncated: 1000 b"):
        Run(e).train()


@pytest.mark.parametrize("given", [False, True])
def test_a_checkpoint_that_names_a_single_pass(chain: Path, tmp_path: Path, given: bool) -> None:
    """As all did once: where it is off, the run goes on as if it were not there."""
    e = replace(experiment("ode", chain, optim={"updates": 1}), out=tmp_path)
    Run(e).train()
    (path,) = tmp_path.glob("*/checkpoints/*/meta.json")
    meta = json.loads(path.read_text())
    meta["config"]["geometry"]["single_pass"] = given
    path.write_text(json.dumps(meta))
    longer = replace(e, optim=replace(e.optim, updates=2), accept_changes=given)
    if given:
        with pytest.raises(UserError, match=r"step-000001: geometry\.single_pass must be false"):
            Run(longer).train()
    else:
        assert json.loads((Run(longer).train() / INDEX).read_text())["updates"] == 2


@pytest.fixture
def scripted_motion(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """M of the checks is scripted; the hashes of the weights that were checked are returned."""
    values = iter([0.9, 0.95, 0.5, 0.4, 0.3, 0.2, 0.1])
    hashes: list[str] = []

    def rollouts(self: Validation, pipeline: Pipeline, processes: object) -> torch.Tensor:
        hashes.append(weights_hash(pipeline.transformer))
        return self.batch.latents

    monkeypatch.setattr(Validation, "rollouts", rollouts)
    monkeypatch.setattr(Validation, "measure", lambda self, video: {"M": next(values)})
    return hashes


def test_early_stop_keeps_the_weights_before_the_fall(
    chain: Path, tmp_path: Path, scripted_motion: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    e = replace(experiment("dmd", chain, optim={"updates": 7}), out=tmp_path)
    folder = Run(e).train()
    facts = json.loads((folder / INDEX).read_text())
    checks = [line for line in read_log(e.folder) if line["kind"] == "monitor"]
    assert checks[-1]["update"] == 5  # the third check in a row below 0.8 x 0.95
    assert facts["sha256"] == scripted_motion[1]
    assert facts["sha256"] not in scripted_motion[2:5]
    assert facts["updates"] == 2
    assert "motion collapse at update 5" in capsys.readouterr().out


def test_without_early_stop_the_run_goes_on_and_says_so(
    chain: Path, tmp_path: Path, scripted_motion: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    e = experiment("aad", chain, optim={"updates": 6})
    assert not e.monitor.early_stop
    folder = Run(replace(e, out=tmp_path)).train()
    facts = json.loads((folder / INDEX).read_text())
    assert facts["updates"] == 6
    assert facts["sha256"] == scripted_motion[5]
    said = capsys.readouterr().out
    assert "motion collapse" in said
    assert "its motion has COLLAPSED (M 0.20, best 0.95)" in said.splitlines()[-1]


def test_a_time_limit_leaves_a_checkpoint_to_go_on_from(chain: Path, tmp_path: Path) -> None:
    e = replace(experiment("ode", chain), out=tmp_path)
    facts = json.loads((Run(replace(e, max_minutes=1e-9)).train() / INDEX).read_text())
    assert facts["updates"] == 1
    assert [p.name for p in checkpoint.steps(e.folder)] == ["step-000001"]
    again = Run(replace(e, max_minutes=1e-9)).train()  # the same command: it has ended
    assert json.loads((again / INDEX).read_text()) == facts
    assert json.loads((Run(e).train() / INDEX).read_text())["updates"] == 2


def test_two_step_students_and_ablations_train(chain: Path, tmp_path: Path) -> None:
    e = experiment("aad", chain, optim={"updates": 1})
    for name, change in {
        "two": dict(sigmas=(1.0, 0.8333333333333334)),
        "causal": dict(discriminator=DiscriminatorConfig(taps=(1,), causal=True, per_frame=True)),
    }.items():
        folder = Run(replace(e, out=tmp_path, name=name, **change)).train()  # type: ignore[arg-type]
        assert Pipeline.from_pretrained(folder).info.sigmas == change.get("sigmas", (1.0,))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(device="tpu"), "auto, cpu, cuda or mps, got 'tpu'"),
        (dict(precision="fp8"), "auto, fp32 or bf16, got 'fp8'"),
        (dict(gather_bf16=True), "gather_bf16 needs a run that computes in bf16"),
        (dict(teacher=None), "needs --teacher"),
    ],
)
def test_impossible_settings_are_refused(chain: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Run(experiment("dmd", chain, **change))
    assert "\n" not in str(error.value)


def test_a_student_is_no_teacher(chain: Path) -> None:
    with pytest.raises(UserError, match="holds stage 'ode', a teacher is needed"):
        Run(experiment("dmd", chain, teacher=final(chain, "ode")))


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            pick_device("cuda")
