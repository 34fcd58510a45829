"""One training run from a config: build the stage, train, watch, save."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from aad1.device import pick_device
from aad1.parallel import mesh
from aad1.train.blocks import checkpoint_blocks, compile_blocks
from aad1.train.config import Experiment
from aad1.train.guard import StopFlag, Stopped, only_run
from aad1.train.log import RunLog, SilentLog
from aad1.train.loop import Trainer
from aad1.train.monitor import CollapseMonitor
from aad1.train.record import write_record
from aad1.train.results import Results
from aad1.train.resume import Checkpoints
from aad1.train.setup import Setup, heads
from aad1.train.throughput import Throughput


class Run:
    """A training run: `Run(experiment).train()` returns the folder of the final model.

    setup: what it works with, for programs that measure without data or weights.
    """

    def __init__(self, experiment: Experiment, setup: type[Setup] = Setup) -> None:
        self.experiment = e = experiment
        device = mesh.local_device(pick_device(e.device).type)
        self.processes = mesh.start(e.mesh, device)
        self.stop = StopFlag()
        with self.processes.together():
            self.setup = setup(e, self.processes, device)
        self.processes = self.setup.processes

    def train(self) -> Path:
        """Train to the end (continuing an interrupted run) and write the final model.

        Stopped if a signal ended the run early, after a checkpoint.
        """
        e, main = self.experiment, self.processes.main
        if e.compile:
            compile_blocks()
        with ExitStack() as stack:
            with self.processes.together():
                if main:
                    stack.enter_context(only_run(e.folder))
            stack.enter_context(self.stop.listening())
            kind = RunLog if main else SilentLog
            log = stack.enter_context(kind(e.folder, e.name, e.optim.updates))
            trainer = self.trainer(log)
            stack.enter_context(trainer.reader)
            return self._train(trainer, log)

    def trainer(self, log: RunLog) -> Trainer:
        """The trainer, with new networks: to be asked for once."""
        e, setup = self.experiment, self.setup
        stage, source, modules = setup.stage(log)
        with self.processes.together():
            mesh.check_heads(self.processes.shape.cp, heads(modules))
        averaged = tuple(n for n in ("generator", "text") if n in modules)
        trainer = Trainer(
            stage, source, modules, averaged, e.optim, seed=e.seed, device=setup.device,
            bf16=setup.bf16, critic_warmup=getattr(e.stage, "critic_warmup", 0),
            processes=self.processes, max_skipped=e.max_skipped, keep_gathered=e.keep_gathered,
            average_on_cpu=e.average_on_cpu, moments_on_cpu=e.moments_on_cpu,
            device_noise=e.device_noise, prefetch=e.prefetch, cudnn_attention=e.cudnn_attention,
        )  # fmt: skip
        if e.checkpoint_blocks:
            for module in modules.values():
                checkpoint_blocks(module)
        return trainer

    def _train(self, trainer: Trainer, log: RunLog) -> Path:
        e, main = self.experiment, self.processes.main
        final = e.folder / "final"
        monitor = CollapseMonitor(e.monitor)
        checkpoints = Checkpoints(self.setup, trainer, monitor)
        before = checkpoints.resume(log)
        if main:
            write_record(e, e.folder / "config.yaml")
        if checkpoints.ended and final.is_dir():
            log.say(
                f"{e.name} has ended ({checkpoints.ended}); model in {final}. To train on, remove "
                f"{e.folder} or choose another --name"
            )
            return final
        results = Results(self.setup, trainer)
        began = time.monotonic() - before
        speed = Throughput(trainer, self.processes)
        reason = self._updates(trainer, monitor, checkpoints, results, log, began, speed)
        checkpoints.save(time.monotonic() - began, ended=reason)
        if e.monitor.early_stop and monitor.collapsed and monitor.kept:
            for name, weight in monitor.kept["weights"].items():
                trainer.averages.tensors["generator"][name].copy_(weight)
            trainer.update = monitor.kept["update"]  # the model says how long it was trained
            reason += f", weights of update {trainer.update} (M {monitor.best:.2f}) kept"
        elif monitor.collapsed:
            last = monitor.history[-1][1]
            reason += f"; its motion has COLLAPSED (M {last:.2f}, best {monitor.best:.2f})"
        made = results.sheet()
        if main:
            log.values(trainer.update, results.validation.measure(made), "final")
        results.write(final)
        log.say(f"{e.name} ended at {reason}; model in {final}{speed.summary()}")
        return final

    def _updates(
        self,
        trainer: Trainer,
        monitor: CollapseMonitor,
        checkpoints: Checkpoints,
        results: Results,
        log: RunLog,
        began: float,
        speed: Throughput,
    ) -> str:
        """Train until something ends it, and say what. began: when, less what was trained before.

        Stopped after a signal.
        """
        e, sums = self.experiment, _Means()
        # Stages II and III roll out their own frames.
        watched = self.setup.stage_name in ("dmd", "aad", "joint") and e.monitor.every > 0
        while trainer.update < e.optim.updates:
            if e.max_minutes:
                spent = (time.monotonic() - began) / (60 * e.max_minutes)
                trainer.spent = float(self.processes.mean(torch.tensor(spent)))
            with speed.step():
                logs = trainer.step(stop=self._asked_to_stop)
            if logs is None:
                checkpoints.save(time.monotonic() - began)
                name = next(filter(None, self.processes.gather(self.stop.name)), "a signal")
                raise Stopped(
                    f"{e.name} stopped by {name} at update {trainer.update}, checkpoint written; "
                    "the same command goes on"
                )
            sums.add(logs)
            update = trainer.update
            log.advance(update)
            if update % e.log_every == 0 or update == e.optim.updates:
                log.values(update, sums.take() | speed.take())
            if watched and (update % e.monitor.every == 0 or update == 1):
                values = results.check(trainer.stage)
                monitor.check(update, values["M"], trainer.averages.tensors["generator"])
                log.values(update, values, "monitor")
                if monitor.collapsed:
                    log.say(f"motion collapse: M {values['M']:.2f}, best {monitor.best:.2f}")
                    if e.monitor.early_stop:
                        return f"motion collapse at update {update}"
            if e.sample_every and update % e.sample_every == 0:
                results.sheet()
            if update % e.checkpoint_every == 0:
                checkpoints.save(time.monotonic() - began)
            if trainer.spent >= 1:
                return f"max_minutes at update {update}"
        return "the last update"

    def _asked_to_stop(self) -> bool:
        """Whether a signal came, to any process."""
        return self.processes.any(bool(self.stop.name))


class _Means:
    """Means of logged tensors since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}

    def add(self, logs: Mapping[str, torch.Tensor]) -> None:
        for name, value in logs.items():
            total, count = self._sums.get(name, (torch.zeros_like(value), 0))
            self._sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        out = {name: float(total) / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return out
