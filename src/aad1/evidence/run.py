"""The runner: takes the next unfinished run, trains, measures, writes, and stops in time.

    python -m aad1.evidence --minutes 25

Needs torch, numpy, safetensors, pillow and pyyaml. Runs follow one another in one process. A run
is a result once its JSON is there, which is written last. One that meets the time limit (or a
signal) saves itself and goes on in the next call; one that was killed is done again.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from aad1.device import pick_device
from aad1.errors import UserError
from aad1.evidence import gate
from aad1.evidence.arms import Arm, hashes, settings_hash
from aad1.evidence.bench import Bench
from aad1.evidence.clock import Clock, OutOfTime
from aad1.evidence.curves import curves
from aad1.evidence.measure import Sizes
from aad1.evidence.results import (
    DIVERGED,
    DONE,
    FAILED,
    FINISHED,
    Record,
    git_commit,
    load_all,
    say,
    source_hash,
)
from aad1.evidence.store import Store, missing_data
from aad1.train.blocks import plain_blocks
from aad1.train.guard import Stopped
from aad1.train.loop import NonFinite
from aad1.train.run import Run


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the runner works."""

    work: Path
    """Weights and real clips; must stay between calls that build on one another."""
    results: Path
    """Where results are written."""
    published: tuple[Path, ...] = ()
    """Further folders of results that count as finished."""
    minutes: float = math.inf
    sizes: Sizes = Sizes()
    device: str = "auto"
    commit: str = ""
    ignore_gate: str = ""
    """Why the arms are run although the gate was not passed."""
    compile: bool = True
    known_seconds: bool = True
    """Whether a run that was never timed is taken to last as `clock.SECONDS` says."""


BEFORE = ("teacher", "gate")
"""Groups during which settings may still change."""


class Runner:
    """Runs arms in the order given."""

    def __init__(self, arms: list[Arm], settings: Settings, plan: list[Arm] | None = None) -> None:
        self.arms, self.settings = arms, settings
        self.all = {arm.name: arm for arm in (*(plan or arms), *arms)}
        self.hashes = hashes(list(self.all.values()))
        self.settings_hash = settings_hash(plan or arms)
        self.commit, self.source = settings.commit or git_commit(), source_hash()
        self.clock = Clock(settings.minutes, self.all, settings.known_seconds)
        self.store = Store(settings.work, self.all, self.hashes)
        for folder in (settings.work, settings.results):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None

    @cached_property
    def device(self) -> torch.device:
        return pick_device(self.settings.device)

    @cached_property
    def bench(self) -> Bench:
        s = self.settings
        return Bench(s.work / "real", s.results, s.sizes, self.device)

    # -- what is there ----------------------------------------------------------------------

    def records(self) -> dict[str, Record]:
        """All results there are."""
        return load_all([*self.settings.published, self.settings.results])

    def _result(self, arm: Arm, records: Mapping[str, Record]) -> str:
        """The status of its result, "" if there is none of the settings of now."""
        record = records.get(arm.name)
        same = record is not None and record.settings_hash == self.hashes[arm.name]
        return record.status if record is not None and same else ""

    def finished(self, arm: Arm, records: Mapping[str, Record]) -> bool:
        """Whether there is a result. UserError if it was made with other settings and an ablation
        was run: from then on they are frozen."""
        record = records.get(arm.name)
        if record is None or record.status not in FINISHED:
            return False
        if record.settings_hash == self.hashes[arm.name]:
            return True
        frozen = [r.name for r in records.values() if r.group and r.group not in BEFORE]
        if frozen:
            raise UserError(
                f"{arm.name} has a result of other settings ({record.settings_hash}, now "
                f"{self.hashes[arm.name]}), and {frozen[0]} was run with those: take back the "
                "change, or move all results to another folder"
            )
        self._put_aside(record)
        return False

    def _put_aside(self, record: Record) -> None:
        """Keep a result of settings that were changed before any ablation ran."""
        results, label = self.settings.results, record.settings_hash[:6]
        name = f"{record.arm}-{label}-s{record.seed}"
        samples = record.samples
        if samples and (results / samples).exists():  # the next run's take the old name
            samples = f"{name}{Path(samples).suffix}"
            (results / record.samples).rename(results / samples)
        replace(record, name=name, samples=samples).save(results)
        if (old := results / f"{record.name}.json").exists():
            old.unlink()
        found = gate.read(results)
        if found is not None:
            gate.write(found, results, f"gate-{found['settings'][:6]}.json")
            (results / gate.FILE).unlink()
        say(f"{record.name}: settings changed, the former result is kept as {name}")

    # -- the loop ---------------------------------------------------------------------------

    def run(self) -> int:
        """Runs what fits; returns how many runs were finished. UserError for a device that is not
        there: that is no failure of a run."""
        pick_device(self.settings.device)
        done = 0
        try:
            for arm in self.arms:
                records = self.records()
                if self.finished(arm, records):
                    continue
                if not self._may(arm, records):
                    break
                lacking = missing_data(arm)
                if lacking:
                    say(f"{arm.name}: no data ({lacking} is missing)")
                    continue
                missing = self.store.missing(arm)
                ill = [m.name for m in missing if self._result(m, records) == DIVERGED]
                if ill:
                    say(f"{arm.name}: cannot begin, {ill[0]} diverged")
                    continue
                self.clock.check([*missing, arm], records, first=done == 0)
                for parent in missing:
                    say(f"{parent.name}: its weights are needed for {arm.name}")
                    self._one(parent)
                lost = self.store.missing(arm)
                if lost:
                    say(f"{arm.name}: cannot begin, {lost[0].name} left no weights")
                    continue
                self._one(arm)
                done += 1
                if arm.key == "gate-C" and not arm.label:
                    self._gate(self.records())
                if arm.group not in BEFORE:  # until then, a trial may want them
                    self.store.drop_unneeded(self.records())
        except (OutOfTime, Stopped) as error:
            say(str(error))
        say(f"{done} runs in {self.clock.spent():.1f} minutes")
        return done

    def _may(self, arm: Arm, records: Mapping[str, Record]) -> bool:
        """Whether the gate lets this arm run; judges it first if both its runs are there."""
        if arm.group in BEFORE:
            return True
        found = self._gate(records)
        if self.settings.ignore_gate:
            return True
        if found is None:
            say("the gate was not tried yet: run the group 'gate' first")
            return False
        if not found["passed"]:
            failed = [name for name, met in found["conditions"].items() if not met]
            say(
                f"the gate is closed ({', '.join(failed)} not met): choose other settings "
                "(--override, --label), or --ignore-gate REASON"
            )
            return False
        return True

    def _gate(self, records: Mapping[str, Record]) -> dict[str, Any] | None:
        folders = (self.settings.results, *self.settings.published)
        return gate.found_or_judged(folders, self.all.values(), records, self.settings_hash)

    # -- one run ----------------------------------------------------------------------------

    def _one(self, arm: Arm) -> None:
        began = time.monotonic()
        records = self.records()
        before = records.get(arm.name)
        # If only its weights are missing, the result stays as it was.
        written = self._result(arm, records) in FINISHED
        earlier = self.store.cut_off(arm)
        status, error = self._trained(arm, earlier, began)
        trained = earlier + time.monotonic() - began
        say(f"{arm.name}: {status} {error} after {trained:.0f} s of training")
        if written:
            assert before is not None
            self._same_weights(arm, before)
        else:
            record = Record(
                name=arm.name, arm=arm.key, title=arm.title, group=arm.group, seed=arm.seed,
                status=status, error=error, settings_hash=self.hashes[arm.name],
                settings=arm.settings(), updates=arm.updates, train_seconds=round(trained, 2),
                device=self._device_name(), torch=torch.__version__, commit=self.commit,
                source_hash=self.source, parent=arm.parent, start=self.store.sha(arm.parent),
                gate=self._gate_note(arm), curves=curves(self.store.runs / arm.name),
                earlier=(*before.earlier, before.error) if before and before.error else (),
            )  # fmt: skip
            if status == DONE:
                record = self._measured(arm, record)
            record.save(self.settings.results)
        self.store.clear(arm)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _trained(self, arm: Arm, earlier: float, began: float) -> tuple[str, str]:
        """Trains and keeps the weights; returns status and error. Stopped if it was cut off."""
        store = self.store
        teacher = None if arm.is_teacher else store.model(arm.teacher)
        init = store.model(arm.parent) if arm.parent not in ("", arm.teacher) else None
        e = replace(arm.placed(store.runs, teacher, init), device=self.settings.device)
        if not self.settings.compile:
            e = replace(e, compile=False)
        try:
            run = Run(e)
            with self.clock.until_the_limit(run.stop, self.records()):
                made = run.train()
            # Should measuring be cut off, it is not trained again.
            store.mark(arm, earlier + time.monotonic() - began)
            store.keep(arm, made)
        except Stopped:
            store.mark(arm, earlier + time.monotonic() - began)
            raise
        except NonFinite as problem:
            return DIVERGED, str(problem)
        except (UserError, RuntimeError, OSError, ValueError) as problem:
            return FAILED, f"{type(problem).__name__}: {problem}"
        finally:
            plain_blocks()
        return DONE, ""

    def _measured(self, arm: Arm, record: Record) -> Record:
        try:
            record = self.bench.measured(arm, self.store.model(arm.name), record)
        except (UserError, RuntimeError, ValueError) as problem:
            text = f"measuring: {type(problem).__name__}: {problem}"
            say(f"{arm.name}: {text}")
            return replace(record, status=FAILED, error=text)
        if not any(arm.name in (other.parent, other.teacher) for other in self.all.values()):
            self.store.drop(arm)
        return record

    def _same_weights(self, arm: Arm, before: Record) -> None:
        """Say so if weights that were made again are not those of the result."""
        if self.store.model(arm.name).is_dir() and self.store.sha(arm.name) != before.weights:
            say(
                f"{arm.name}: not the weights of its result; runs that start from these are no "
                "exact partners of earlier ones (`start` in their results tells them apart)"
            )

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type

    def _gate_note(self, arm: Arm) -> str:
        if arm.group in BEFORE:
            return ""
        if self.settings.ignore_gate:
            return f"ignored: {self.settings.ignore_gate}"
        return "passed"
