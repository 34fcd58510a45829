"""From mp4 files to a streaming generator on a tiny Wan: data commands, three stages, pipeline."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import aad1, finish
from safetensors.torch import save_file

from aad1 import cli
from aad1.convert import convert
from aad1.core.chunks import ChunkGeometry
from aad1.data.shards import ClipShards, write_manifest, write_shard
from aad1.data.text_store import TextStore
from aad1.errors import UserError
from aad1.model_info import read_info, weights_hash
from aad1.models.discriminator import DiscriminatorConfig
from aad1.models.dit import WanConfig, WanTransformer
from aad1.models.umt5 import NEGATIVE_PROMPT, Umt5Encoder
from aad1.pipeline import Pipeline
from aad1.presets import preset
from aad1.stages.base import Batch, Conditioner
from aad1.train import results, resume
from aad1.train.blocks import checkpoint_blocks
from aad1.train.config import Experiment, MonitorConfig, WanData
from aad1.train.guard import Stopped
from aad1.train.loop import Trainer
from aad1.train.plan import Cluster, plan
from aad1.train.record import read_record, write_record
from aad1.train.run import Run
from aad1.train.sources import Stored, permuted
from aad1.train.wan_world import ClipSource, StoredConditioner, WanWorld
from wan_files import original_transformer

STAGES = ("ode", "dmd", "aad")
MODEL = WanConfig(
    num_attention_heads=2, attention_head_dim=12, ffn_dim=48, num_layers=3, text_dim=24, freq_dim=16
)


@pytest.fixture(scope="module")
def data(tiny_wan: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and trajectories, made by the command line."""
    out = tmp_path_factory.mktemp("data")
    common = ["--device", "cpu"]
    size = ["--width", "32", "--height", "32", "--frames", "17"]
    assert cli.main(["data", "videos", str(videos), "--model", str(tiny_wan),
                     "--out", str(out / "clips"), *size, *common]) == 0  # fmt: skip
    assert cli.main(["data", "trajectories", "--teacher", str(tiny_wan), "--data",
                     str(out / "clips"), "--out", str(out / "trajectories"), "--steps", "4",
                     "--clips", "3", "--batch", "2", *common]) == 0  # fmt: skip
    return out


@pytest.fixture(scope="module")
def umt5(tiny_wan: Path) -> Umt5Encoder:
    return Umt5Encoder.from_pretrained(tiny_wan)


def experiment(stage: str, tiny_wan: Path, data: Path, out: Path, **changes: Any) -> Experiment:
    """wan1.3b-<stage>, made tiny: two updates of one clip."""
    e = preset(f"wan1.3b-{stage}")
    before = {"dmd": "ode", "aad": "dmd"}
    optim = replace(e.optim, updates=2, accumulate=2, lr=1e-3, critic_lr=1e-3, heads_lr=1e-3)
    standard: dict[str, Any] = dict(
        data=WanData(train=data / "clips", heldout=data / "clips",
                     trajectories=data / "trajectories", base=tiny_wan,
                     width=32, height=32, frames=5),
        model=MODEL, text_length=512, geometry=ChunkGeometry(chunk=2, sink=1, window=5),
        discriminator=DiscriminatorConfig(taps=(0, 2)), optim=optim, teacher=tiny_wan,
        init=out / f"wan1.3b-{before[stage]}" / "final" if stage in before else None,
        monitor=replace(e.monitor, every=0, clips=1), out=out, device="cpu", log_every=1,
    )  # fmt: skip
    return replace(e, **(standard | changes))


@pytest.fixture(scope="module")
def chain(tiny_wan: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """out/ of the three stages."""
    out = tmp_path_factory.mktemp("out")
    for stage in STAGES:
        torch.manual_seed(0)
        Run(experiment(stage, tiny_wan, data, out)).train()
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_on_from_the_one_before(chain: Path, tiny_wan: Path, stage: str) -> None:
    final = chain / f"wan1.3b-{stage}" / "final"
    info = read_info(final)
    assert (info.stage, info.updates, info.world) == (stage, 2, "wan")
    assert (info.width, info.height, info.frames, info.fps) == (32, 32, 5, 16.0)
    lines = [json.loads(x) for x in (final.parent / "log.jsonl").read_text().splitlines()]
    assert [x["update"] for x in lines if x["kind"] == "train"] == [1, 2]
    assert info.parent is not None
    before = {"ode": tiny_wan, "dmd": chain / "wan1.3b-ode" / "final",
              "aad": chain / "wan1.3b-dmd" / "final"}[stage]  # fmt: skip
    if stage == "ode":
        assert info.parent["stage"] == "teacher" and info.parent["sha256"].startswith("files-")
    else:
        assert info.parent["sha256"] == read_info(before).sha256
    model = WanTransformer.from_pretrained(final / "transformer")
    assert weights_hash(model) == info.sha256
    old = WanTransformer.from_pretrained(before / "transformer").state_dict()
    moved = [n for n, p in model.state_dict().items() if not torch.equal(p, old[n])]
    assert "blocks.0.attn1.to_q.weight" in moved and "proj_out.weight" in moved
    e = read_record(final.parent / "config.yaml")
    assert isinstance(e.data, WanData) and e.data.base == tiny_wan


def test_reading_ahead_changes_no_weight_and_ends_with_the_run(
    chain: Path, data: Path, tiny_wan: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Against a run that does not read ahead, and one that a signal stops and that goes on."""
    e = replace(experiment("ode", tiny_wan, data, tmp_path), name="without", prefetch=0)
    threads: list[str] = []
    read = ClipSource.read

    def signalled(self: ClipSource, position: int, count: int) -> Batch:
        threads.append(threading.current_thread().name)
        if position == 2 and len(threads) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return read(self, position, count)

    wanted = read_info(chain / "wan1.3b-ode" / "final").sha256
    assert read_info(Run(e).train()).sha256 == wanted
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"; [\d.e-]+ clips/s, of \d+ s in training steps [\d.e-]+ s waited", last)
    monkeypatch.setattr(ClipSource, "read", signalled)
    e = replace(e, name="stopped", prefetch=2)
    with pytest.raises(Stopped, match="stopped by SIGTERM at update"):
        Run(e).train()
    assert set(threads) == {"aad1-reader"}
    assert "aad1-reader" not in {t.name for t in threading.enumerate()}
    assert read_info(Run(replace(e, prefetch=1)).train()).sha256 == wanted


def test_a_prompt_that_is_gone_is_told_at_the_step_that_needs_it(
    data: Path, tiny_wan: Path, tmp_path: Path
) -> None:
    """The thread finds it missing one update earlier."""
    seed = next(n for n in range(99) if permuted(2, 1, 3, n) == [0])  # an update takes two clips
    e = experiment("ode", tiny_wan, tmp_path, tmp_path / "out", seed=seed)
    for name in ("clips", "trajectories"):
        shutil.copytree(data / name, tmp_path / name)
    (prompt,), *others = ClipShards(tmp_path / "trajectories").captions
    assert [prompt] not in others
    for name in ("clips", "trajectories"):
        TextStore(tmp_path / name / "text").path(prompt).unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"no embedding of the prompt '{prompt}'"):
        Run(e).train()
    lines = [json.loads(x) for x in (e.folder / "log.jsonl").read_text().splitlines()]
    assert [x["update"] for x in lines] == [1]
    assert "aad1-reader" not in {t.name for t in threading.enumerate()}


def test_prompts_are_kept_in_memory_once_read(data: Path, tiny_wan: Path, tmp_path: Path) -> None:
    e = experiment("ode", tiny_wan, tmp_path, tmp_path)
    for name in ("clips", "trajectories"):
        shutil.copytree(data / name, tmp_path / name)
    assert isinstance(e.data, WanData)
    world = WanWorld(e.data, 0, torch.device("cpu"))
    source = world.train()
    assert isinstance(source, Stored)
    captions = source.read(0, 1).captions
    wanted = TextStore(tmp_path / "clips" / "text")(captions[0])
    for name in ("clips", "trajectories"):
        shutil.rmtree(tmp_path / name / "text" / "prompts")
    assert torch.equal(world.text(captions[0]), wanted) and wanted.any()


@pytest.mark.parametrize("stage", ["ode", "aad"])
def test_a_missing_shard_is_told_once_by_two_processes(
    data: Path, tiny_wan: Path, tmp_path: Path, stage: str
) -> None:
    """Those of the clips to train on, which are opened later than what is held out."""
    clips = "trajectories" if stage == "ode" else "clips"
    for name in ("clips", "trajectories"):
        shutil.copytree(data / name, tmp_path / name)
    e = experiment(stage, tiny_wan, tmp_path, tmp_path, mesh="dp=2", init=tiny_wan)
    e = replace(e, data=replace(e.data, heldout=data / "clips"))
    write_record(e, tmp_path / "config.yaml")
    shard = tmp_path / clips / "shard-00000.safetensors"
    shard.unlink()
    found = finish(aad1(2, "train", str(tmp_path / "config.yaml")))
    assert found == [(2, f"aad1: shard {shard} is missing\n"), (2, "")]


def test_two_processes_read_their_shards_and_train_alike(
    chain: Path, data: Path, tiny_wan: Path, tmp_path: Path
) -> None:
    """Stages II and III again, in two: the first losses, which hang on weights, heads and noise
    alone, are those of one process, and what comes out has moved the same way."""
    for stage in ("dmd", "aad"):
        e = experiment(stage, tiny_wan, data, chain, mesh="dp=2", average_on_cpu=True)
        write_record(replace(e, out=tmp_path), tmp_path / "config.yaml")
        for code, said in finish(aad1(2, "train", str(tmp_path / "config.yaml"))):
            assert code == 0, said
        logs = []
        for folder in (chain / e.name, tmp_path / e.name):
            lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
            logs.append(next(x for x in lines if x["kind"] == "train"))
        for name in ("loss", "fake", "dmd", "critic", "real_logit", "penalty", "generator_norm"):
            if name in logs[0]:
                assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-3), (stage, name)
        assert e.init is not None
        start, one, two = (
            torch.cat(
                [p.detach().flatten() for p in WanTransformer.from_pretrained(f).parameters()]
            )
            for f in (
                e.init / "transformer",
                chain / e.name / "final" / "transformer",
                tmp_path / e.name / "final" / "transformer",
            )
        )
        assert float((one - start).abs().max()) > 1e-5  # an average of two updates moves little
        assert float(torch.cosine_similarity(one - start, two - start, dim=0)) > 0.99


def test_what_comes_out_streams(
    chain: Path, tiny_wan: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    final = chain / "wan1.3b-aad" / "final"
    pipe = Pipeline.from_pretrained(final)
    assert torch.equal(pipe.text(["a square"]), Umt5Encoder.from_pretrained(
        tiny_wan, dtype=torch.float32)(["a square"]))  # fmt: skip
    image = torch.zeros(40, 40, 3, dtype=torch.uint8).numpy()
    stream = pipe.stream(image, "a square moves", seed=3)
    parts = [next(stream) for _ in range(3)]
    assert [list(p.shape) for p in parts] == [[9, 32, 32, 3], [8, 32, 32, 3], [8, 32, 32, 3]]
    whole = pipe(image, "a square moves", num_chunks=3, seed=3)
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(parts[1], parts[2])
    reference = json.loads((final / "text" / "config.json").read_text())
    assert reference["base"] == str(tiny_wan.resolve())
    # Exported, the prompt encoder comes along.
    out = tmp_path / "exported"
    capfd.readouterr()
    assert cli.main(["export", str(final), "--out", str(out), "--no-half"]) == 0
    printed = capfd.readouterr()
    assert printed.err == "" and re.fullmatch(rf"{out}: \d+\.\d MiB\n", printed.out)
    source = Umt5Encoder.from_pretrained(out).source
    assert source is not None and out / "text" / "text_encoder" in source.parents
    assert torch.equal(
        Pipeline.from_pretrained(out)(image, "a square moves", num_chunks=3, seed=3), whole
    )


def test_weights_of_any_layout_train(data: Path, tiny_wan: Path, tmp_path: Path) -> None:
    """Wan's own layout as base and teacher, a .pt as the student: the same first update."""
    original, generator = tmp_path / "original", tmp_path / "generator.pt"
    convert(tiny_wan, original, "original")
    convert(tiny_wan, generator, "self-forcing")
    finals = []
    for out, places in (
        ("a", dict(teacher=tiny_wan)),
        ("b", dict(teacher=original, init=generator)),
    ):
        base = places["teacher"]
        e = experiment("ode", tiny_wan, data, tmp_path, **places)
        assert isinstance(e.data, WanData)
        e = replace(e, data=replace(e.data, base=base), out=tmp_path / out)
        e = replace(e, optim=replace(e.optim, updates=1, accumulate=1))
        assert plan(replace(e, model=WanConfig()), Cluster()).teacher == MODEL
        finals.append(Run(e).train())
    one, two = map(read_info, finals)
    assert one.sha256 == two.sha256
    assert one.parent is not None and one.parent["stage"] == "teacher"
    assert two.parent is not None and two.parent["stage"] == "distilled"
    assert Pipeline.from_pretrained(finals[1]).text.length == 512  # follows the note to `original`
    e = experiment("ode", tiny_wan, data, tmp_path, teacher=generator)
    with pytest.raises(UserError, match="generator.pt holds stage 'distilled', a teacher"):
        Run(e)


def test_data_commands_take_other_layouts(
    tiny_wan: Path, data: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, generator = tmp_path / "original", tmp_path / "teacher.safetensors"
    convert(tiny_wan, original, "original")
    convert(tiny_wan, generator, "comfyui")
    size = ["--width", "32", "--height", "32", "--frames", "17", "--device", "cpu"]
    assert cli.main(["data", "videos", str(videos), "--model", str(original),
                     "--out", str(tmp_path / "clips"), *size]) == 0  # fmt: skip
    again, first = ClipShards(tmp_path / "clips"), ClipShards(data / "clips")
    assert torch.equal(again.read_tensors(), first.read_tensors())
    (tmp_path / "prompts.txt").write_text("a square\n")
    command = ["data", "trajectories", "--teacher", str(generator), "--prompts",
               str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "t"), "--steps", "2",
               "--student-steps", "1", *size]  # fmt: skip
    assert cli.main(command) == 2
    assert f"no text_encoder, tokenizer found; looked in {generator}" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
    assert cli.main([*command, "--base", str(original)]) == 0
    assert ClipShards(tmp_path / "t").clip_shape == (2, 16, 5, 4, 4)


def test_the_conditioner_looks_text_up_and_guides_by_the_negative_prompt(
    data: Path, tiny_wan: Path, umt5: Umt5Encoder
) -> None:
    e = experiment("dmd", tiny_wan, data, data)
    assert isinstance(e.data, WanData)
    world = WanWorld(e.data, 0, torch.device("cpu"))
    conditioner = world.conditioner(e.geometry)
    assert isinstance(conditioner, StoredConditioner)
    captions = [["a square moves"], ["a long scene", "a long scene", "scene number 2"]]
    got = conditioner(captions, 5)
    want = Conditioner(umt5, e.geometry)(captions, 5)
    assert torch.equal(got, want.bfloat16())
    assert torch.equal(got[1, 3], umt5(["scene number 2"])[0].bfloat16())
    null = conditioner.null(got.float())
    assert null.shape == got.shape and null.dtype == torch.float32
    negative = umt5([NEGATIVE_PROMPT])[0].bfloat16().float()
    assert torch.equal(null[1, 4], negative)
    with pytest.raises(UserError, match="no embedding of the prompt 'unheard of'"):
        conditioner([["unheard of"]], 5)


def test_stage_one_reads_the_states_its_steps_need(data: Path, tiny_wan: Path) -> None:
    e = experiment("ode", tiny_wan, data, data)
    assert isinstance(e.data, WanData)
    world = WanWorld(e.data, 0, torch.device("cpu"))
    stored = ClipShards(data / "trajectories").read_tensors().float()
    assert stored.shape[:2] == (3, 3)
    one = world.trajectories((1.0,)).batch(0, 3)
    two = world.trajectories((1.0, 0.8333333333333334)).batch(0, 3)
    assert one.trajectory is not None and two.trajectory is not None
    assert one.trajectory.shape[1] == 2 and two.trajectory.shape[1] == 3
    assert torch.equal(one.trajectory, two.trajectory[:, [0, 2]])
    assert torch.equal(one.latents, two.trajectory[:, 2])
    sums = {round(float(row.sum()), 2) for row in stored}
    assert {round(float(row.sum()), 2) for row in two.trajectory} == sums
    with pytest.raises(UserError, match=r"has no states at sigma 0\.9000"):
        world.trajectories((1.0, 0.9))
    # Trajectories serve as clips as well: their end points.
    ends = WanWorld(replace(e.data, train=data / "trajectories"), 0, torch.device("cpu"))
    assert torch.equal(ends.train().batch(0, 3).latents, one.latents)


def test_two_steps_bf16_and_ablations_train(chain: Path, data: Path, tiny_wan: Path,
                                            tmp_path: Path) -> None:  # fmt: skip
    two = (1.0, 0.8333333333333334)
    judge = DiscriminatorConfig(taps=(1,), causal=True, per_frame=True)
    for stage, changes in {
        "aad": [dict(sigmas=two), dict(discriminator=judge), dict(precision="bf16")],
        "dmd": [dict(sigmas=two), dict(precision="bf16", checkpoint_blocks=False)],
        "ode": [dict(sigmas=two, precision="bf16")],
    }.items():
        e = experiment(stage, tiny_wan, data, chain)
        e = replace(e, optim=replace(e.optim, updates=1, accumulate=1), out=tmp_path)
        for i, change in enumerate(changes):
            it = Run(replace(e, name=f"{stage}-{i}", **change))  # type: ignore[arg-type]
            if stage == "dmd":  # the real score is frozen: bfloat16 is enough for it
                frozen = it.setup.teacher_network(trained=False)
                assert frozen.dtype == (torch.bfloat16 if it.setup.bf16 else torch.float32)
                assert it.setup.teacher_network(trained=True).dtype == torch.float32
            assert (it.train() / "model_index.json").exists()


def test_the_monitor_rolls_wan_clips_out(
    chain: Path, data: Path, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Any] = []
    for module in (resume, results):
        monkeypatch.setattr(module, "weights_hash", lambda m: hashed.append(m) or weights_hash(m))
    e = experiment("dmd", tiny_wan, data, chain, monitor=MonitorConfig(every=1, clips=2))
    e = replace(e, optim=replace(e.optim, updates=2, accumulate=1), out=tmp_path)
    folder = Run(e).train().parent
    lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    assert [x["M"] >= 0 for x in lines if x["kind"] == "monitor"] == [True, True]
    assert list((folder / "samples").glob("*.png"))
    assert len(hashed) == 2  # of the last checkpoint and of the final model, not at each check


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    plain = WanTransformer(MODEL)
    again = WanTransformer(MODEL)
    again.load_state_dict(plain.state_dict())
    checkpoint_blocks(again)
    x, text = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 3, 5, 24)
    for model in (plain, again):
        (model(x, torch.ones(1), text) ** 2).mean().backward()
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    with torch.no_grad():
        assert torch.equal(plain(x, torch.ones(1), text), again(x, torch.ones(1), text))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(teacher=None), "needs --teacher"),
        (dict(teacher=Path("nowhere")), "nowhere does not exist"),
        (dict(monitor=MonitorConfig(every=0, clips=9)), "holds 8 clips, monitor.clips asks for 9"),
        (dict(geometry=ChunkGeometry()), None),
        (dict(geometry=ChunkGeometry(chunk=3)), "5 latent frames do not split into 1"),
    ],
)
def test_impossible_settings_are_refused(
    chain: Path, data: Path, tiny_wan: Path, change: dict[str, Any], message: str | None
) -> None:
    e = experiment("dmd", tiny_wan, data, chain, **change)
    if message is None:
        Run(e)
        return
    with pytest.raises(UserError, match=message) as error:
        Run(e)
    assert "\n" not in str(error.value)


def test_missing_data_says_which_command_makes_it(
    chain: Path, data: Path, tiny_wan: Path, tmp_path: Path
) -> None:
    e = experiment("dmd", tiny_wan, data, chain)
    assert isinstance(e.data, WanData)
    for field, command in (("heldout", "videos"), ("train", "videos"),
                           ("trajectories", "trajectories")):  # fmt: skip
        stage = "ode" if field == "trajectories" else "dmd"
        e = experiment(stage, tiny_wan, data, chain)
        gone = replace(e.data, **{field: tmp_path / "gone"})  # type: ignore[type-var]
        e = replace(e, data=gone, init=None, out=tmp_path)
        with pytest.raises(UserError, match=f"data.{field}: .*gone.*`aad1 data {command}`"):
            Run(e).train()
    e = experiment("dmd", tiny_wan, data, chain, teacher=chain / "wan1.3b-ode" / "final")
    with pytest.raises(UserError, match="holds stage 'ode', a teacher is needed"):
        Run(e)


# -- the dry run ----------------------------------------------------------------------------------


def measured(trainer: Trainer, frozen: int) -> dict[str, int]:
    """Bytes that the trainer holds after an update, by kind."""
    live = [p for module in trainer.modules.values() for p in module.parameters()]
    moments = [
        s[name]
        for listed in trainer.optimizers.values()
        for optimizer in listed
        for s in optimizer.state.values()
        for name in s
        if name != "step"
    ]
    average = [p for tensors in trainer.averages.tensors.values() for p in tensors.values()]
    return {
        "weights": sum(p.nbytes for p in live) + frozen,
        "gradients": sum(p.grad.nbytes for p in live if p.grad is not None),
        "adam": sum(m.nbytes for m in moments),
        "average": sum(p.nbytes for p in average),
    }


@pytest.mark.parametrize(
    "stage,taps", [("ode", (0, 2)), ("dmd", (0, 2)), ("aad", (0, 2)), ("aad", (0, 1))]
)
def test_the_plan_s_states_are_what_the_trainer_holds(
    chain: Path, data: Path, tiny_wan: Path, tmp_path: Path, stage: str, taps: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    e = experiment(stage, tiny_wan, data, chain, discriminator=DiscriminatorConfig(taps=taps))
    e = replace(e, optim=replace(e.optim, updates=1, accumulate=1), out=tmp_path)
    it = Run(e)
    held: dict[str, int] = {}
    step = Trainer.step

    def watched(self: Trainer, stop: Any) -> Any:
        logs = step(self, stop)
        stage_object: Any = self.stage
        frozen = getattr(stage_object, "real_score", None)
        held.update(measured(self, sum(p.nbytes for p in frozen.parameters()) if frozen else 0))
        return logs

    monkeypatch.setattr(Trainer, "step", watched)
    it.train()
    p = plan(replace(e, precision="fp32"), Cluster())
    for kind, size in held.items():
        assert sum(getattr(role, kind) for role in p.roles) == size, kind
    count = sum(q.numel() for q in it.setup.generator.parameters())
    assert p.roles[0].parameters == count
    names = {"ode": ["generator"], "dmd": ["generator", "real score", "fake score"],
             "aad": ["generator", "discriminator", "its heads"]}[stage]  # fmt: skip
    assert [role.name for role in p.roles] == names


def test_trajectories_from_a_file_of_prompts(
    data: Path,
    tiny_wan: Path,
    umt5: Umt5Encoder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\n two  words \none\n")
    command = ["data", "trajectories", "--teacher", str(tiny_wan), "--out", str(tmp_path / "out"),
               "--steps", "4", "--width", "32", "--height", "48", "--frames", "17",
               "--device", "cpu"]  # fmt: skip
    assert cli.main([*command, "--prompts", str(prompts), "--part", "0/1"]) == 0
    shards = ClipShards(tmp_path / "out")
    assert shards.captions == [["one"], ["two words"], ["one"]]
    assert shards.clip_shape == (3, 16, 5, 6, 4)
    store = TextStore(tmp_path / "out" / "text")
    assert store.negative == NEGATIVE_PROMPT and "two words" in store
    capsys.readouterr()
    for extra, message in (
        ([], "give either --prompts FILE or --data FOLDER"),
        (["--prompts", str(tmp_path / "no.txt")], "is not a readable UTF-8 text file"),
        (["--prompts", str(prompts), "--part", "3"], "--part must be i/n with 0 <= i < n, got 3"),
        (["--prompts", str(prompts), "--student-steps", "3"], "must be 1, 2 or 4, got 3"),
        (["--prompts", str(prompts), "--width", "40"], "width must be a multiple of 16, got 40"),
        (["--prompts", str(prompts), "--precision", "fp8"], "precision must be auto, fp32 or bf16"),
        (["--data", str(data / "clips"), "--negative-prompt", "x"], "must be that of --data"),
    ):
        assert cli.main([*command, *extra]) == 2
        assert message in capsys.readouterr().err


def test_what_cannot_be_is_told_before_anything_is_loaded_or_written(
    data: Path, tiny_wan: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def never(*args: object, **options: object) -> None:
        raise AssertionError("weights were read")

    for name in ("train.wan_base.load_text_encoder", "models.checkpoints.load_wan_transformer",
                 "models.wan_codec.load_wan_vae"):  # fmt: skip
        monkeypatch.setattr(f"aad1.{name}", never)
    states = {
        "narrow": original_transformer(text=16),
        "clip": original_transformer(text=24) | {"img_emb.proj.0.weight": torch.zeros(2)},
        "cut": original_transformer(text=24),
    }
    del states["cut"]["head.modulation"]
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    short, prompts = tmp_path / "short", tmp_path / "prompts.txt"
    short.mkdir()
    latents = np.zeros((1, 16, 3, 4, 4), np.float16)  # of 9 frames
    write_shard(short / "shard-00000.safetensors", latents, [["a"]], tensor="latents")
    write_manifest(short, world="wan", split="train", seed=0, config={}, tensor="latents",
                   shards=[("shard-00000.safetensors", 1)])  # fmt: skip
    prompts.write_text("a\n")
    told = ["--prompts", str(prompts), "--base", str(tiny_wan), "--width", "32", "--height", "32"]
    clips = ["--data", str(data / "clips")]
    size = ["--width", "32", "--height", "32", "--model", str(tiny_wan)]
    out, wan = tmp_path / "out", str(tiny_wan)
    narrow, clip, cut = (str(tmp_path / f"{name}.safetensors") for name in states)
    widths = "narrow.safetensors takes text of width 16, "
    for words, message in (
        (["trajectories", "--teacher", narrow, *told], f"{widths}{tiny_wan / 'text_encoder'}"),
        (["trajectories", "--teacher", narrow, *clips], f"{widths}{data / 'clips' / 'text'} has"),
        (["trajectories", "--teacher", clip, *told], "CLIP image branch"),
        (["trajectories", "--teacher", clip, *clips], "CLIP image branch"),
        (["trajectories", "--teacher", cut, *told], "1 missing (scale_shift_table)"),
        (["trajectories", "--teacher", wan, *told, "--frames", "9"],
         "--frames must be 1 + 16 n, a picture and n chunks, got 9; the nearest is 17"),
        (["trajectories", "--teacher", wan, "--data", str(short)], "3 latent frames do not split"),
        (["trajectories", "--teacher", wan, *told, "--steps", "5"],
         "--steps must be a multiple of --student-steps 2, whose noise levels are kept, got 5; the "
         "nearest are 4 and 6"),
        (["trajectories", "--teacher", wan, *clips, "--steps", "0"], "got 0; the nearest is 2"),
        (["videos", str(videos), *size, "--frames", "9"], "got 9; the nearest is 17"),
        (["videos", str(videos), *size, "--frames", "80"], "got 80; the nearest are 65 and 81"),
    ):  # fmt: skip
        assert cli.main(["data", *words, "--out", str(out), "--device", "cpu"]) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not out.exists()
    with pytest.raises(AssertionError, match="weights were read"):
        cli.main(["data", "trajectories", "--teacher", wan, *told, "--out", str(out),
                  "--device", "cpu"])  # fmt: skip


def test_an_lmdb_becomes_stage_one_s_data(tiny_wan: Path, data: Path, tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")

    rows = np.random.default_rng(0).standard_normal((2, 5, 5, 16, 4, 4)).astype(np.float16)
    (tmp_path / "ode").mkdir()
    with lmdb.open(str(tmp_path / "ode"), map_size=1 << 24) as env, env.begin(write=True) as txn:
        txn.put(b"latents_shape", b"2 5 5 16 4 4")
        for i in range(2):
            txn.put(f"latents_{i}_data".encode(), rows[i].tobytes())
            txn.put(f"prompts_{i}_data".encode(), f"prompt {i}".encode())
    out = tmp_path / "trajectories"
    assert cli.main(["data", "lmdb", str(tmp_path / "ode"), "--model", str(tiny_wan), "--out",
                     str(out), "--device", "cpu", "--student-steps", "2"]) == 0  # fmt: skip
    e = experiment("ode", tiny_wan, data, tmp_path)
    e = replace(e, data=WanData(train=out, heldout=out, trajectories=out, base=tiny_wan))
    final = Run(replace(e, optim=replace(e.optim, updates=1, accumulate=1))).train()
    assert read_info(final).stage == "ode"
