"""The float8 gate: what it measures, when it fails, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aad1.cli import main
from aad1.errors import UserError
from aad1.evaluate.compare import METRICS, Figure, compare
from aad1.evaluate.measure import measure_all
from aad1.evaluation import gate as gate_module
from aad1.evaluation.gate import GATED, Gate, fp8_gate
from aad1.evaluation.model import rollouts
from aad1.evaluation.worlds import RealWorld, drawn
from aad1.fast import layers, ops
from aad1.models.dit import WanTransformer
from aad1.pipeline import Pipeline
from aad1.worlds.sprites import SpritesConfig

CONFIG = SpritesConfig(size=16, frames=9, num_sprites=1)
Build = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def world() -> RealWorld:
    return drawn(CONFIG, clips=16, long_frames=17, fps=4.0, reference_clips=20)


@pytest.fixture
def pipe(tiny_pipeline: Build) -> Pipeline:
    made = tiny_pipeline()
    torch.manual_seed(0)
    config = replace(made.transformer.config, attention_head_dim=16)  # float8 wants 16s
    made.transformer = WanTransformer(config).eval()
    for p in made.transformer.parameters():
        torch.nn.init.normal_(p, std=0.15)

    class AnyWords:  # the tiny prompt encoder knows five words; sprites have more
        dim = 8

        def __call__(self, prompts: list[str]) -> torch.Tensor:
            return torch.stack([torch.full((4, 8), (sum(map(ord, p)) % 7) / 7) for p in prompts])

    made.text = AnyWords()  # type: ignore[assignment]
    return made


def run(pipe: Pipeline, world: RealWorld, clips: int = 16) -> Gate:
    return fp8_gate(pipe, world, clips=clips, seed=3, tell=lambda _: None)


def test_the_plain_side_is_what_evaluate_measures(pipe: Pipeline, world: RealWorld) -> None:
    gate = run(pipe, world)
    videos = rollouts(pipe, world.starts, range(3, 19), 2)
    measured = measure_all(
        [(s.key, s.prompt, v) for s, v in zip(world.starts, videos, strict=True)], fps=world.fps
    )
    want = compare(measured, world.short.reference, None, [METRICS[name] for name in GATED])
    for name in GATED:
        assert gate.plain[name].value == pytest.approx(want[name].value, rel=1e-6)
        assert gate.float8[name].value != gate.plain[name].value
    assert len(gate.latents) == 2 and all(1e-4 < value < 0.3 for value in gate.latents)
    assert gate.record()["passed"] == (not gate.failures())


def test_without_float8_both_sides_are_one(
    pipe: Pipeline, world: RealWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_quantised", layers._plain)
    gate = run(pipe, world)
    assert max(gate.latents) < 1e-5
    assert all(abs(gate.change(name)) < 1e-2 for name in GATED) and not gate.failures()


def test_coarser_numbers_fail(
    pipe: Pipeline, world: RealWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: scales that are off by a factor."""
    plain = ops.fp8_product
    monkeypatch.setattr(
        ops, "fp8_product", lambda x, xs, w, ws, b, dtype: plain(x, xs * 30, w, ws, b, dtype)
    )
    gate = run(pipe, world)
    assert gate.failures() and max(gate.latents) > 0.1
    assert "float8 fails: " in gate.lines()[-1]


def figures(**values: float) -> dict[str, Figure]:
    return {
        name: Figure(value=values.get(name, 1.0), interval=(0.5, 2.0), floor=0.1, floor_range=None,
                     videos=16, floor_videos=16)
        for name in GATED
    }  # fmt: skip


@pytest.mark.parametrize(
    "name,value,fails",
    [("M", 1.09, False), ("M", 1.11, True), ("M", 0.91, False), ("M", 0.89, True),
     ("FDtd", 1.09, False), ("FDtd", 1.11, True), ("FDtd", 0.5, False),
     ("FDnss_early", 1.11, True), ("FDnss_late", 1.11, True)],
)  # fmt: skip
def test_motion_may_not_change_and_distances_may_not_grow(
    name: str, value: float, fails: bool
) -> None:
    gate = Gate(plain=figures(), float8=figures(**{name: value}), latents=(0.01,))
    assert gate.failures() == ([name] if fails else [])
    assert gate.change(name) == pytest.approx(value - 1)
    assert ("FAILS" in "".join(gate.lines())) == fails


def test_what_cannot_be_gated_is_refused(pipe: Pipeline, world: RealWorld, tiny_pipeline: Build
                                         ) -> None:  # fmt: skip
    with pytest.raises(UserError, match="at least 16 videos, got 8"):
        run(pipe, world, clips=8)
    with pytest.raises(UserError, match="a width of 24 is not a multiple of 16"):
        run(tiny_pipeline(), world)
    videos = replace(world.short.reference.videos, stride=2)
    reference = replace(world.short.reference, videos=videos)
    with pytest.raises(
        UserError, match="every 1. pair of frames measured, the real ones 16x16 and"
    ):
        run(pipe, replace(world, short=replace(world.short, reference=reference)))
    unknown = replace(figures()["M"], value=None, reason="needs at least 16 videos")
    gate = Gate(plain=figures() | {"M": unknown}, float8=figures(), latents=())
    with pytest.raises(UserError, match="M cannot be gated: needs at least 16"):
        gate.failures()


@pytest.mark.parametrize("value,code", [(1.05, 0), (1.2, 1)])
def test_the_command_ends_as_the_gate_does(
    value: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked: dict[str, object] = {}

    def fake(pipe: Pipeline, world: RealWorld, **options: object) -> Gate:
        asked.update(options, starts=len(world.starts), stage=pipe.info.stage)
        return Gate(plain=figures(), float8=figures(FDtd=value), latents=(0.01, 0.02))

    monkeypatch.setattr(gate_module, "fp8_gate", fake)
    flags = ["evaluate", "--model", "doom", "--quick", "--fp8-gate", "--out", str(tmp_path / "o"),
             "--device", "cpu"]  # fmt: skip
    if code:
        with pytest.raises(SystemExit) as end:
            main(flags)
        assert end.value.code == code
    else:
        assert main(flags) == 0
    assert (asked["clips"], asked["starts"], asked["stage"]) == (64, 16, "aad")
    record = json.loads((tmp_path / "o" / "fp8_gate.json").read_text())
    assert record["passed"] == (code == 0) and record["latents"] == [0.01, 0.02]
    assert ("fails: FDtd" if code else "float8 passes") in capsys.readouterr().out


def test_the_gate_is_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "a", "b", "--fp8-gate"]) == 2
    assert "--fp8-gate is of a model: give --model NAME" in capsys.readouterr().err
