"""The dry run at full size: figures known from elsewhere, and nothing touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from aad1 import cli
from aad1.errors import UserError
from aad1.models.weights import write_json
from aad1.presets import preset
from aad1.presets.wan import LARGE
from aad1.train.plan import Cluster, describe, plan


def test_a_dry_run_of_the_full_size_needs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "wan14b-aad", "--dry-run", "--gpus", "64", "--optim.batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "name: wan14b-aad" in text and "batch: 2" in text
    for words in ("14.288 G", "0.740 G", "states sharded over 64, a clip over 8", "in all",
                  "batch 512 as 2 x 256", "40% of 989 TFLOP/s"):  # fmt: skip
        assert words in text, words
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["train", "sprites-dmd", "--dry-run"]) == 2
    assert "knows the Wan presets" in capsys.readouterr().err
    for field in ("teacher", "init"):
        assert cli.main(["train", "wan14b-aad", "--dry-run", f"--{field}", "nowhere"]) == 2
        printed = capsys.readouterr()
        assert printed.err == f"aad1: --{field}: nowhere does not exist\n" and not printed.out
    for flags, message in (
        (("--gpus", "0"), "--gpus must be at least 1, got 0"),
        (("--mfu", "2"), "--mfu must be in (0, 1], got 2.0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["train", "wan14b-aad", "--dry-run", *flags])
        shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert message in shown


def test_figures_of_the_plan() -> None:
    """Against figures worked out by hand from the public architecture and this project's notes."""
    whole = plan(preset("wan14b-aad"), Cluster())
    generator, critic, _ = whole.roles
    assert generator.parameters / 1e9 == pytest.approx(14.29, abs=0.01)
    assert generator.total / generator.parameters == 16  # fp32 weights, gradients, a moment, EMA
    assert critic.total / critic.parameters == pytest.approx(12, abs=0.01)
    first = plan(preset("wan14b-ode"), Cluster()).roles[0]
    assert first.adam == 8 * first.parameters  # beta1 is not 0 in stage I
    small = plan(preset("wan1.3b-dmd"), Cluster())
    assert small.roles[0].parameters / 1e9 == pytest.approx(1.419, abs=0.001)
    assert small.roles[1].weights == 2 * small.roles[1].parameters
    # K and V of 17 frames at 288 MB; what a chunk sees of them is not held twice.
    assert small.activations["rollout"] / 1e9 == pytest.approx(17 * 0.2875, rel=0.01)
    # Those K and V are kept for the replay, not while the discriminator is trained. A clip and its
    # perturbed copy are alive there: a pass's block inputs more than where a clip is judged.
    judged = whole.activations["generator, judged"] - 17 * 1.278e9
    inputs = 40 * 32760 * 5120 * 4
    assert whole.activations["discriminator"] - judged == pytest.approx(inputs, rel=0.01)
    aad = preset("wan14b-aad")
    for graph, passes, clips in (("single", 1, 1), ("pairs", 2, 1), ("whole", 4, 2)):
        other = plan(replace(aad, stage=replace(aad.stage, graph=graph)), Cluster())  # type: ignore[type-var]
        # The blocks' inputs of all passes, and one block with all the clips of its pass.
        want = passes * inputs + clips * (judged - inputs)
        assert other.activations["discriminator"] == pytest.approx(want, rel=0.01)
        assert (other.work > whole.work) == (graph == "single")
    assert whole.context == 1
    assert plan(preset("wan14b-aad"), Cluster(gpus=64)).context == 8
    assert plan(preset("wan1.3b-aad"), Cluster(gpus=64)).context == 4  # 12 heads
    assert plan(preset("wan1.3b-aad"), Cluster(gpus=6)).context == 6
    mesh = plan(replace(preset("wan14b-aad"), mesh="cp=4,replicas=2"), Cluster(gpus=64))
    assert (mesh.context, mesh.shards) == (4, 32)
    with pytest.raises(UserError, match="cp=8 must divide the heads .*: 1, 2, 3, 4, 6, 12"):
        plan(replace(preset("wan1.3b-aad"), mesh="cp=8"), Cluster(gpus=64))
    # Two blocks, what is outside them, and all of the generator if it is kept gathered.
    aad, eight = preset("wan1.3b-aad"), Cluster(gpus=8)
    apart, kept = (plan(replace(aad, keep_gathered=k), eight) for k in (False, True))
    assert kept.copies - apart.copies == 4 * kept.roles[0].parameters
    half = plan(replace(aad, gather_bf16=True), eight)
    assert half.copies == pytest.approx(kept.copies / 2, rel=0.05)  # all but what is in no block
    # An ODE update: one block-causal forward of 64 clips, two more for its backward, one again.
    ode = plan(preset("wan1.3b-ode"), Cluster())
    pairs = (1 + 4 * 5 + 4 * 4 * 9) * 1560**2
    by_hand = 82e12 + 30 * 4 * 1536 * (pairs + 32760 * 512)
    assert ode.work == pytest.approx(64 * 4 * by_hand, rel=0.03)
    two = plan(replace(preset("wan1.3b-dmd"), sigmas=(1.0, 5 / 6)), Cluster())
    assert two.work > small.work


def test_what_is_kept_on_the_cpu_is_told_apart() -> None:
    e = preset("wan1.3b-dmd")
    here = plan(e, Cluster(gpus=8))
    away = plan(replace(e, average_on_cpu=True, moments_on_cpu=True), Cluster(gpus=8))
    n = here.roles[0].parameters
    assert sum(role.on_cpu for role in here.roles) == 0
    # The average, the best one so far, and a moment of the generator and of the fake score.
    assert sum(role.on_cpu for role in away.roles) == 4 * 4 * n
    states = [sum(role.total for role in p.roles) for p in (here, away)]
    assert states[0] - states[1] == 4 * 4 * n
    text = describe(replace(e, average_on_cpu=True), Cluster(gpus=8))
    assert f"beside it {2 * 4 * n / 8 / 2**30:.1f} GiB of the CPU's memory per GPU" in text
    assert "of the CPU's memory" not in describe(e, Cluster(gpus=8))


def test_more_gpus_share_states_and_time() -> None:
    one, many = (
        describe(preset("wan1.3b-ode"), Cluster(gpus=n, tflops=99000)).splitlines() for n in (1, 8)
    )

    def figure(lines: list[str], name: str, column: int) -> float:
        (line,) = [x for x in lines if x.startswith(name)]
        return float(line.split()[column])

    assert figure(one, "generator", -1) == pytest.approx(8 * figure(many, "generator", -1), 0.01)
    assert figure(one, "time:", 1) == pytest.approx(8 * figure(many, "time:", 1), 0.02)
    assert any("a clip over 4" in line for line in many)


def test_a_larger_teacher_is_read_from_its_folder(tmp_path: Path) -> None:
    raw = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "patch_size": [1, 2, 2]}
    write_json(tmp_path / "transformer" / "config.json", raw)
    e = replace(preset("wan1.3b-dmd"), teacher=tmp_path)
    generator, real, fake, best = plan(e, Cluster()).roles
    assert plan(e, Cluster()).teacher == LARGE
    assert generator.parameters < 1.5e9 < 14e9 < real.parameters == fake.parameters
    # The warm-up stops early and goes back to the best weights, so these are kept as well.
    assert best.total == 4 * generator.parameters
