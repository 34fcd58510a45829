"""The bench on which models are judged: real clips, measured once, and a model's result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aad1.atomic import replace_file
from aad1.evidence.arms import TEACHER, Arm
from aad1.evidence.measure import (
    TEST,
    VALIDATION,
    Figures,
    Real,
    Sizes,
    controls,
    drawn_clips,
    evaluate_student,
    evaluate_teacher,
    floor,
    recorded_clips,
    seconds_per_chunk,
    summary,
)
from aad1.evidence.results import DONE, Record, say
from aad1.media.sheet import contact_sheet
from aad1.pipeline import Pipeline
from aad1.train.config import LatentData, SpritesData

LONGEST = ("C", "long_rollout", "stage2")
"""Arms whose rollouts of 161 frames are measured too."""


class Bench:
    """Measures models; real: a folder for what was measured of real clips."""

    def __init__(self, real: Path, results: Path, sizes: Sizes, device: torch.device) -> None:
        self.folder, self.results, self.sizes, self.device = real, results, sizes, device
        self._real: dict[str, Real] = {}

    def real(self, which: str, arm: Arm) -> Real:
        """The clips that models are judged on."""
        data = arm.experiment.data
        name = f"{which}, {type(data).__name__}"
        if name not in self._real:
            if isinstance(data, SpritesData):
                found = drawn_clips(data.world, self.sizes, which, self.folder, self.device)
            else:
                assert isinstance(data, LatentData)
                found = recorded_clips(data, self.sizes, self.device)
            self._real[name] = found
        return self._real[name]

    def measured(self, arm: Arm, model: Path, record: Record) -> Record:
        """The record with the model's figures and samples. A teacher's come with the controls."""
        began = time.monotonic()
        pipe = Pipeline.from_pretrained(model, device=self.device, fast=False)
        facts = {}
        real = self.real(VALIDATION if arm.group == "gate" else TEST, arm)
        if arm.is_teacher:
            figures, reasons, shown = self._teacher(arm, pipe)
            self._controls(arm, record)
        else:
            figures, reasons, shown = evaluate_student(
                pipe, real, self.sizes, longest=arm.key in LONGEST
            )
            facts["seconds_per_chunk"] = seconds_per_chunk(pipe, real)
        sheet = ""
        if arm.seed == 0 or arm.group == "gate":
            sheet = f"{arm.name}.jpg"
            captions = [c[-1] for c in real.captions[: len(shown)]]
            picture = contact_sheet(list(shown), captions, columns=6).convert("RGB")
            with replace_file(self.results / sheet) as temporary:
                picture.save(temporary, "JPEG", quality=80)
        say(f"{arm.name}: {summary(figures)}")
        return replace(
            record, figures=rounded(figures), reasons=reasons, facts=facts, samples=sheet,
            weights=pipe.info.sha256, evaluate_seconds=round(time.monotonic() - began, 2),
        )  # fmt: skip

    def _teacher(self, arm: Arm, pipe: Pipeline) -> Any:
        e = arm.experiment
        told = {
            which: evaluate_teacher(
                pipe, self.real(which, arm), self.sizes, e.trajectories, e.geometry
            )
            for which in ((TEST, VALIDATION) if arm.name == TEACHER else (TEST,))
        }
        figures, reasons, shown = told[TEST]
        if VALIDATION in told:
            figures["validation"] = told[VALIDATION][0]["short"]
        return figures, reasons, shown

    def _controls(self, arm: Arm, made_with: Record) -> None:
        """Written once for each world, with its teacher."""
        name = "controls" if arm.name == TEACHER else "doom_controls"
        found = controls(self.real(TEST, arm), self.sizes)
        figures: Figures = {f"{control}/{videos}": values for control, sets in found.items()
                            for videos, values in sets.items()}  # fmt: skip
        if arm.name == TEACHER:
            figures["validation real/short"] = floor(self.real(VALIDATION, arm), "short")
        Record(
            name=f"{name}-s0", arm=name, title="what needs no model", group="teacher",
            seed=0, status=DONE, device=made_with.device, torch=made_with.torch,
            commit=made_with.commit, source_hash=made_with.source_hash, figures=rounded(figures),
        ).save(self.results)  # fmt: skip


def rounded(
    figures: Mapping[str, Mapping[str, float | None]],
) -> dict[str, dict[str, float | None]]:
    """Five significant digits."""
    return {
        videos: {
            name: None if value is None else float(f"{value:.5g}") for name, value in some.items()
        }
        for videos, some in figures.items()
    }
