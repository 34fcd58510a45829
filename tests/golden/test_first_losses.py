"""The first losses of each tiny stage, as numbers: a change of the mathematics shows here.

fp32 on the CPU, three updates a stage, the whole chain. If a change is meant to move the numbers,
run this file as a program (`python tests/golden/test_first_losses.py`) and commit what it writes.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aad1.models.discriminator import DiscriminatorConfig
from aad1.models.dit import WanConfig
from aad1.pipeline import Pipeline
from aad1.presets import preset
from aad1.train.config import MonitorConfig
from aad1.train.run import Run

NUMBERS = Path(__file__).with_suffix(".json")
STAGES = ("teacher", "ode", "dmd", "aad")
LOSSES = {"teacher": ("loss",), "ode": ("loss",), "dmd": ("loss", "fake"),
          "aad": ("loss", "critic", "penalty")}  # fmt: skip
UPDATES = 3
# Threads, instruction sets and torch versions round differently: 1e-6 a step, here a few of them.
TOLERANCE = 1e-3
MODEL = WanConfig(
    num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=2, text_dim=16,
    freq_dim=32, rope_theta=100.0, prediction="x0",
)  # fmt: skip


def shake(folder: Path) -> None:
    """Random weights: a teacher of three updates gives almost nothing but zeros.

    Its hash is fixed as well: it seeds the trajectories' noise, and rounding would change it.
    """
    pipe = Pipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.copy_(0.15 * torch.randn(p.shape, generator=generator))
    pipe.info = replace(pipe.info, sha256="golden")
    pipe.save_pretrained(folder)


def first_losses(out: Path) -> dict[str, dict[str, list[float]]]:
    """{stage: {loss: values of the first updates}} of the sprites-tiny chain, smaller still."""
    found = {}
    for i, stage in enumerate(STAGES):
        e = preset(f"sprites-tiny-{stage}")
        folder = out / e.name
        e = replace(
            e, out=out, model=MODEL, device="cpu", precision="fp32", log_every=1,
            optim=replace(e.optim, updates=UPDATES, batch=4, warmup=0, lr=3e-4),
            discriminator=DiscriminatorConfig(taps=(0, 1)),
            trajectories=replace(e.trajectories, clips=8, steps=4, batch=8),
            monitor=MonitorConfig(every=0, clips=2),
        )  # fmt: skip
        if stage != "teacher":
            e = replace(
                e, teacher=out / "sprites-tiny-teacher" / "final",
                init=out / f"sprites-tiny-{STAGES[i - 1]}" / "final",
            )  # fmt: skip
        final = Run(e).train()
        if stage == "teacher":
            shake(final)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["kind"] == "train"]
        found[stage] = {name: [line[name] for line in lines] for name in LOSSES[stage]}
    return found


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    return first_losses(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("stage", STAGES)
def test_first_losses_are_as_recorded(
    losses: dict[str, dict[str, list[float]]], stage: str
) -> None:
    recorded = json.loads(NUMBERS.read_text())[stage]
    assert recorded.keys() == losses[stage].keys()
    for name, values in recorded.items():
        assert losses[stage][name] == pytest.approx(values, rel=TOLERANCE), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        numbers = first_losses(Path(folder))
    NUMBERS.write_text(json.dumps(numbers, indent=2) + "\n")
    print(NUMBERS.read_text())
