"""A run's checkpoints: what is written in one, and going on from the newest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aad1.errors import UserError
from aad1.model_info import current_fields, weights_hash
from aad1.train import checkpoint
from aad1.train.guard import changes
from aad1.train.log import RunLog
from aad1.train.loop import Trainer
from aad1.train.monitor import CollapseMonitor
from aad1.train.record import to_plain
from aad1.train.setup import Setup


class Checkpoints:
    """Those of one run, with its trainer and monitor."""

    def __init__(self, setup: Setup, trainer: Trainer, monitor: CollapseMonitor) -> None:
        self.setup, self.trainer, self.monitor = setup, trainer, monitor
        self.processes, self.folder = setup.processes, setup.experiment.folder
        self.ended = ""
        """Why the run is over, if the newest checkpoint says that it is."""

    def _identity(self) -> dict[str, Any]:
        """What must not change when a run continues."""
        setup = self.setup
        plain = to_plain(setup.experiment)
        return {
            "kind": setup.stage_name,
            "parent": setup.parent.sha256 if setup.parent else "",
            "teacher": setup.teacher_info.sha256 if setup.teacher_info else "",
            "model": plain["model"],
        }

    def _limits(self) -> list[float]:
        """What ends the run."""
        e = self.setup.experiment
        return [e.optim.updates, e.max_minutes]

    def resume(self, log: RunLog) -> float:
        """Continue from the newest checkpoint if there is one; returns seconds trained before."""
        found = checkpoint.steps(self.folder)
        if not found:
            return 0.0
        with self.processes.together():
            meta = checkpoint.read_meta(found[-1])
            self._same_run(found[-1], meta)
        stored, trainer = checkpoint.shapes(found[-1]), self.trainer
        averages = trainer.averages.tensors["generator"]
        kept = {n: torch.zeros_like(w) for n, w in averages.items() if f"kept.{n}" in stored}
        extra = {f"kept.{n}": w for n, w in kept.items()}
        trainer.restore(
            meta["counters"], stored,
            lambda tensors: checkpoint.load(found[-1], tensors | extra, self.processes),
        )  # fmt: skip
        self.monitor.restore(meta["monitor"])
        if kept:
            self.monitor.kept = {"update": meta["kept_update"], "weights": kept}
        # With other limits than before the run is meant to go on.
        if meta["ended"] and meta["limits"] == self._limits():
            self.ended = str(meta["ended"])
        else:
            log.say(f"continuing from {found[-1]}")
        return float(meta["seconds"])

    def _same_run(self, folder: Path, meta: Mapping[str, Any]) -> None:
        """UserError if a checkpoint is another run's, or its settings changed without a flag."""
        for name, value in self._identity().items():
            if meta.get(name) != value:
                found = "; ".join(changes({name: meta.get(name)}, {name: value}, free=()))
                raise UserError(
                    f"{folder} is another run's ({found}): remove {self.folder} or choose another "
                    "--name"
                )
        before = meta["config"]
        geometry = current_fields(before["geometry"], f"{folder}: geometry")
        changed = changes({**before, "geometry": geometry}, to_plain(self.setup.experiment))
        if changed and not self.setup.experiment.accept_changes:
            raise UserError(
                f"{folder} was made with other settings ({'; '.join(changed)}); give "
                "--accept-changes to go on with the new ones"
            )

    def save(self, seconds: float, ended: str = "") -> None:
        """Write one. seconds: trained so far; ended: why the run is over, if it is."""
        trainer = self.trainer
        tensors, kept = trainer.tensors(), self.monitor.kept
        if kept:
            tensors |= {f"kept.{n}": w for n, w in kept["weights"].items()}
        meta = {
            **self._identity(),
            "update": trainer.update,
            "counters": trainer.counters(),
            "monitor": {k: v for k, v in self.monitor.state().items() if k != "kept"},
            "kept_update": kept["update"] if kept else None,
            "config": to_plain(self.setup.experiment),
            "ended": ended,
            "limits": self._limits(),
            "seconds": round(seconds, 2),
            "processes": self.processes.size,
            "torch": torch.__version__,
        }
        if self.processes.size == 1:
            meta["hash"] = weights_hash(trainer.modules["generator"])
        folder = checkpoint.step_folder(self.folder, trainer.update, trainer.turn)
        checkpoint.save(folder, tensors, meta, self.processes)
