"""What runs leave on disk beside their results: folders of cut-off runs, and weights to start from.

Weights are named after a run and its settings. They are dropped when the last run that starts from
them has a result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from aad1.atomic import replace_file, replace_folder
from aad1.evidence.arms import Arm
from aad1.evidence.results import FINISHED, Record
from aad1.model_info import read_info
from aad1.pipeline import Pipeline
from aad1.train.config import LatentData

CUT_OFF = "cut_off.json"


class Store:
    """Folders under one: `runs` and `models`.

    arms: all by name, those that are not run now included; hashes: of their settings.
    """

    def __init__(self, work: Path, arms: Mapping[str, Arm], hashes: Mapping[str, str]) -> None:
        self.runs, self.models = work / "runs", work / "models"
        self.arms, self.hashes = arms, hashes

    # -- weights --------------------------------------------------------------------------

    def model(self, name: str) -> Path:
        """Where a run's weights are kept, by name and settings."""
        return self.models / f"{name}-{self.hashes[name][:8]}"

    def sha(self, name: str) -> str:
        """sha256 of a run's weights; "" if they are not there, or for no name."""
        return read_info(self.model(name)).sha256 if name and self.model(name).is_dir() else ""

    def missing(self, arm: Arm) -> list[Arm]:
        """Runs whose weights it needs and that are not there, the first one first."""
        out: list[Arm] = []
        if arm.is_teacher:
            return out
        for name in (arm.parent, arm.teacher):
            if not self.model(name).is_dir():
                parent = self.arms[name]
                out += [m for m in (*self.missing(parent), parent) if m not in out]
        return out

    def keep(self, arm: Arm, made: Path) -> None:
        """The final model in half precision: what children start from and what is measured."""
        pipe = Pipeline.from_pretrained(made, fast=False)
        with replace_folder(self.model(arm.name)) as temporary:
            pipe.save_pretrained(temporary, torch.float16)

    def drop(self, arm: Arm) -> None:
        """Removes a run's weights."""
        shutil.rmtree(self.model(arm.name))

    def drop_unneeded(self, records: Mapping[str, Record]) -> None:
        """Removes weights that no unfinished run starts from."""
        needed = set()
        for arm in self.arms.values():
            record = records.get(arm.name)
            if record is None or record.status not in FINISHED:
                needed |= {arm.parent, arm.teacher}
        for name in self.arms:
            if name not in needed and self.model(name).is_dir():
                self.drop(self.arms[name])

    # -- folders of runs ------------------------------------------------------------------

    def mark(self, arm: Arm, seconds: float) -> None:
        """Note that this run's folder can be gone on with."""
        with replace_file(self.runs / arm.name / CUT_OFF) as temporary:
            temporary.write_text(json.dumps([self.hashes[arm.name], seconds]))

    def cut_off(self, arm: Arm) -> float:
        """Seconds that a run which saved itself has taken; what cannot go on is removed."""
        folder = self.runs / arm.name
        try:
            identity, seconds = json.loads((folder / CUT_OFF).read_text())
            if identity == self.hashes[arm.name]:
                return float(seconds)
        except (OSError, ValueError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        return 0.0

    def clear(self, arm: Arm) -> None:
        """Removes a finished run's folder, and trajectories, which are large and of one run."""
        shutil.rmtree(self.runs / arm.name, ignore_errors=True)
        if "stage1" in arm.key:
            shutil.rmtree(self.runs / "trajectories", ignore_errors=True)


def missing_data(arm: Arm) -> str:
    """The first folder that a run on a recorded world lacks, or nothing."""
    data = arm.experiment.data
    folders = (data.train, data.heldout, data.codec) if isinstance(data, LatentData) else ()
    return next((str(folder) for folder in folders if not folder.is_dir()), "")
