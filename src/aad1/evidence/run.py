"""The runner: takes the next unfinished run, trains, measures, writes, and stops in time.

    python -m aad1.evidence --minutes 25

Needs torch, numpy, safetensors, pillow and pyyaml. Runs follow one another in one process. A run
is a result once its JSON is there, which is written last. One that meets the time limit (or a
signal) saves itself and goes on in the next call; one that was killed is done again.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from aad1.atomic import replace_file, replace_folder
from aad1.errors import UserError
from aad1.evidence import gate
from aad1.evidence.arms import TEACHER, Arm, hashes, settings_hash
from aad1.evidence.measure import (
    TEST,
    VALIDATION,
    Real,
    Sizes,
    controls,
    drawn_clips,
    evaluate_student,
    evaluate_teacher,
    recorded_clips,
    seconds_per_chunk,
    summary,
)
from aad1.evidence.results import (
    DIVERGED,
    DONE,
    FAILED,
    FINISHED,
    Record,
    git_commit,
    load_all,
    source_hash,
)
from aad1.media.sheet import contact_sheet
from aad1.pipeline import Pipeline
from aad1.train.blocks import plain_blocks
from aad1.train.config import LatentData, SpritesData
from aad1.train.guard import Stopped
from aad1.train.loop import NonFinite
from aad1.train.run import Run
from aad1.train.setup import STAGE_NAMES

SECONDS = {"teacher": 0.08, "ode": 0.25, "dmd": 1.5, "aad": 1.0, "joint": 1.8}
"""Per update on a GPU, until a run of the kind has been timed."""
AROUND = 45.0
"""Seconds of a run beside its updates, until one has been timed."""
LONGEST = ("C", "long_rollout", "stage2")
"""Arms whose rollouts of 161 frames are measured too."""
CURVES = ("gap", "critic", "penalty", "fake", "dmd", "loss", "generator_norm", "critic_norm")


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
    """Whether a run that was never timed is taken to last as `SECONDS` says."""


BEFORE = ("teacher", "gate")
"""Groups during which settings may still change."""


LONG_RUN = 240.0
"""A run that takes longer than so many seconds may be begun although it will not end in time."""
LEAST = 90.0
"""Seconds that must be left for that."""
CUT_OFF = "cut_off.json"


class OutOfTime(Exception):
    """The next run does not fit into what is left."""


class Runner:
    """Runs arms in the order given."""

    def __init__(self, arms: list[Arm], settings: Settings, plan: list[Arm] | None = None) -> None:
        self.arms, self.settings = arms, settings
        self.began = time.monotonic()
        self.runs, self.models = settings.work / "runs", settings.work / "models"
        self.all = {arm.name: arm for arm in (*(plan or arms), *arms)}
        self.hashes = hashes(list(self.all.values()))
        self.settings_hash = settings_hash(plan or arms)
        self.commit, self.source = settings.commit or git_commit(), source_hash()
        for folder in (settings.work, settings.results):
            folder.mkdir(parents=True, exist_ok=True)

    # -- what is there ----------------------------------------------------------------------

    def records(self) -> dict[str, Record]:
        """All results there are."""
        return load_all([*self.settings.published, self.settings.results])

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
        replace(record, name=name).save(results)
        if (old := results / f"{record.name}.json").exists():
            old.unlink()
        found = gate.read(results)
        if found is not None:
            gate.write(found, results, f"gate-{found['settings'][:6]}.json")
            (results / gate.FILE).unlink()
        say(f"{record.name}: settings changed, the former result is kept as {name}")

    @cached_property
    def device(self) -> torch.device:
        from aad1.device import pick_device

        return pick_device(self.settings.device)

    def real(self, which: str, arm: Arm) -> Real:
        """The clips that models are judged on."""
        data = arm.experiment.data
        name = f"{which}, {type(data).__name__}"
        if name not in self._real:
            sizes = self.settings.sizes
            if isinstance(data, SpritesData):
                folder = self.settings.work / "real"
                found = drawn_clips(data.world, sizes, which, folder, self.device)
            else:
                assert isinstance(data, LatentData)
                found = recorded_clips(data, sizes, self.device)
            self._real[name] = found
        return self._real[name]

    @cached_property
    def _real(self) -> dict[str, Real]:
        return {}

    # -- the loop ---------------------------------------------------------------------------

    def run(self) -> int:
        """Runs what fits; returns how many runs were finished."""
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
                updates = self._updates(arm, records)
                if updates is None:
                    say(f"{arm.name}: waits for the runs that its compute is to equal")
                    continue
                self._time_for(arm, updates, records)
                self._do(arm, updates)
                done += 1
                if arm.key == "gate-C" and not arm.label:
                    self._gate(self.records())
        except (OutOfTime, Stopped) as error:
            say(str(error))
        say(f"{done} runs in {(time.monotonic() - self.began) / 60:.1f} minutes")
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
        for folder in (self.settings.results, *self.settings.published):
            found = gate.read(folder)
            if found is not None and found["settings"] == self.settings_hash:
                return found
        full = next((a for a in self.all.values() if a.key == "gate-C" and not a.label), None)
        if full is None or not {full.name, full.parent} <= records.keys():
            return None
        if any(records[n].status != DONE for n in (full.name, full.parent)):
            return None
        found = gate.judge(
            records[full.parent], records[full.name], records.get("teacher-s0"),
            records.get("controls-s0"), self.settings_hash,
        )  # fmt: skip
        gate.write(found, self.settings.results)
        say(f"gate: {'passed' if found['passed'] else 'closed'} {found['conditions']}")
        return found

    def _updates(self, arm: Arm, records: Mapping[str, Record]) -> int | None:
        """How many updates it makes; None if that hangs on runs that are not there."""
        if not arm.equal_compute:
            return arm.experiment.optim.updates
        # What is matched is the time of warm-up and refinement of the same seed.
        names = [f"{key}-s{arm.seed}" for key in ("stage2", "C")]
        alike = f"{arm.key.removesuffix('_compute')}-s{arm.seed}"
        found = [records.get(name) for name in (*names, alike)]
        if any(r is None or r.status != DONE for r in found):
            return None
        stage2, full, own = (r for r in found if r is not None)
        return max(
            1, round((stage2.train_seconds + full.train_seconds) * own.updates / own.train_seconds)
        )

    def _time_for(self, arm: Arm, updates: int, records: Mapping[str, Record]) -> None:
        left = self._left()
        needed = self.estimate(arm, updates, records)
        for parent in self._missing(arm):
            needed += self.estimate(parent, parent.experiment.optim.updates, records)
        if left < needed and (needed < LONG_RUN or left < LEAST):
            raise OutOfTime(f"{arm.name} needs about {needed:.0f} s, {max(left, 0):.0f} s are left")

    def _left(self) -> float:
        """Seconds until the time limit."""
        return 60 * self.settings.minutes - (time.monotonic() - self.began)

    def estimate(self, arm: Arm, updates: int, records: Mapping[str, Record]) -> float:
        """Seconds that a run takes, from those timed before; a tenth more, for safety."""
        stage = STAGE_NAMES[type(arm.experiment.stage)]
        timed = [
            r
            for r in records.values()
            if r.status == DONE
            and r.updates
            and r.name in self.all
            and STAGE_NAMES[type(self.all[r.name].experiment.stage)] == stage
        ]
        if timed:
            same = [r for r in timed if r.arm == arm.key] or timed
            each = max(r.train_seconds / r.updates for r in same)
            return 1.1 * (updates * each + max(r.evaluate_seconds for r in same))
        return updates * SECONDS[stage] + AROUND if self.settings.known_seconds else 0.0

    def _missing(self, arm: Arm) -> list[Arm]:
        """Runs whose weights it needs and that are not there, the first one first."""
        out: list[Arm] = []
        if arm.is_teacher:
            return out
        for name in (arm.parent, arm.teacher):
            if not self._model(name).is_dir():
                parent = self.all[name]
                out += [m for m in (*self._missing(parent), parent) if m not in out]
        return out

    # -- one run ----------------------------------------------------------------------------

    def _model(self, name: str) -> Path:
        """Where a run's weights are kept, by name and settings."""
        return self.models / f"{name}-{self.hashes[name][:8]}"

    def _do(self, arm: Arm, updates: int) -> None:
        for parent in self._missing(arm):
            say(f"{parent.name}: its weights are needed for {arm.name}")
            self._one(parent, parent.experiment.optim.updates)
        self._one(arm, updates)

    def _one(self, arm: Arm, updates: int) -> None:
        began = time.monotonic()
        before = self.records().get(arm.name)
        # Only its weights are missing: the result stays as it was.
        written = (
            before is not None
            and before.status in FINISHED
            and before.settings_hash == self.hashes[arm.name]
        )
        folder = self.runs / arm.name
        earlier = self._cut_off(arm, folder)
        teacher = None if arm.is_teacher else self._model(arm.teacher)
        init = self._model(arm.parent) if arm.parent not in ("", arm.teacher) else None
        e = replace(arm.placed(self.runs, updates, teacher, init), device=self.settings.device)
        if not self.settings.compile:
            e = replace(e, compile=False)
        status, error = DONE, ""
        try:
            run = Run(e)
            with self._until_the_limit(run):
                made = run.train()
            # Should measuring be cut off, it is not trained again.
            self._mark(arm, folder, earlier + time.monotonic() - began)
            self._keep(arm, made)
        except Stopped:
            self._mark(arm, folder, earlier + time.monotonic() - began)
            raise
        except NonFinite as problem:
            status, error = DIVERGED, str(problem)
        except (UserError, RuntimeError, OSError, ValueError) as problem:
            status, error = FAILED, f"{type(problem).__name__}: {problem}"
        finally:
            plain_blocks()
        trained = earlier + time.monotonic() - began
        say(f"{arm.name}: {status} {error} after {trained:.0f} s of training")
        record = Record(
            name=arm.name, arm=arm.key, title=arm.title, group=arm.group, seed=arm.seed,
            status=status, error=error, settings_hash=self.hashes[arm.name],
            settings=arm.settings(), updates=updates, train_seconds=round(trained, 2),
            device=self._device_name(), torch=torch.__version__, commit=self.commit,
            source_hash=self.source, parent=arm.parent, gate=self._gate_note(arm),
            curves=curves(folder),
            earlier=(*before.earlier, before.error) if before and before.error else (),
        )  # fmt: skip
        if status == DONE and not written:
            try:
                record = self._measured(arm, record)
            except (UserError, RuntimeError, ValueError) as problem:
                text = f"measuring: {type(problem).__name__}: {problem}"
                record = replace(record, status=FAILED, error=text)
                say(f"{arm.name}: {text}")
        if not written:
            record.save(self.settings.results)
        shutil.rmtree(folder, ignore_errors=True)
        if "stage1" in arm.key:  # trajectories are large, and made for one run
            shutil.rmtree(self.runs / "trajectories", ignore_errors=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _mark(self, arm: Arm, folder: Path, seconds: float) -> None:
        """Note that this run's folder can be gone on with."""
        with replace_file(folder / CUT_OFF) as temporary:
            temporary.write_text(json.dumps([self.hashes[arm.name], seconds]))

    def _cut_off(self, arm: Arm, folder: Path) -> float:
        """Seconds that a run which saved itself has taken; what cannot go on is removed."""
        try:
            identity, seconds = json.loads((folder / CUT_OFF).read_text())
            if identity == self.hashes[arm.name]:
                return float(seconds)
        except (OSError, ValueError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        return 0.0

    @contextmanager
    def _until_the_limit(self, run: Run) -> Iterator[None]:
        """Asks the run to save itself while there is still time to measure a finished one."""
        if math.isinf(self.settings.minutes):
            yield
            return

        def ask() -> None:
            run.stop.name = run.stop.name or "the time limit"

        # As long as measuring has taken: `estimate` leaves as much.
        measured = [r.evaluate_seconds for r in self.records().values() if r.evaluate_seconds]
        reserve = 1.1 * max(measured) if measured else AROUND
        timer = threading.Timer(max(1.0, self._left() - reserve), ask)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _keep(self, arm: Arm, made: Path) -> None:
        """The final model in half precision: what children start from and what is measured."""
        pipe = Pipeline.from_pretrained(made, fast=False)
        with replace_folder(self._model(arm.name)) as temporary:
            pipe.save_pretrained(temporary, torch.float16)

    def _measured(self, arm: Arm, record: Record) -> Record:
        began = time.monotonic()
        pipe = Pipeline.from_pretrained(self._model(arm.name), device=self.device, fast=False)
        sizes, facts = self.settings.sizes, {}
        which = VALIDATION if arm.group == "gate" else TEST
        real = self.real(which, arm)
        if arm.is_teacher:
            figures, reasons, shown = self._teacher(arm, pipe)
            self._controls(arm)
        else:
            figures, reasons, shown = evaluate_student(
                pipe, real, sizes, longest=arm.key in LONGEST
            )
            facts["seconds_per_chunk"] = seconds_per_chunk(pipe, real)
        if not self._is_parent(arm):
            shutil.rmtree(self._model(arm.name))
        sheet = ""
        if arm.seed == 0 or arm.group == "gate":
            sheet = f"{arm.name}.jpg"
            captions = [c[-1] for c in real.captions[: len(shown)]]
            picture = contact_sheet(list(shown), captions, columns=6).convert("RGB")
            with replace_file(self.settings.results / sheet) as temporary:
                picture.save(temporary, "JPEG", quality=80)
        say(f"{arm.name}: {summary(figures)}")
        return replace(
            record, figures=rounded(figures), reasons=reasons, facts=facts, samples=sheet,
            weights=pipe.info.sha256, evaluate_seconds=round(time.monotonic() - began, 2),
        )  # fmt: skip

    def _teacher(self, arm: Arm, pipe: Pipeline) -> Any:
        e, sizes = arm.experiment, self.settings.sizes
        told = {
            which: evaluate_teacher(pipe, self.real(which, arm), sizes, e.trajectories, e.geometry)
            for which in ((TEST, VALIDATION) if arm.name == TEACHER else (TEST,))
        }
        figures, reasons, shown = told[TEST]
        if VALIDATION in told:
            figures["validation"] = told[VALIDATION][0]["short"]
        return figures, reasons, shown

    def _controls(self, arm: Arm) -> None:
        """Written once for each world, with its teacher."""
        name = "controls" if arm.name == TEACHER else "doom_controls"
        found = controls(self.real(TEST, arm), self.settings.sizes)
        figures = {f"{control}/{videos}": values for control, sets in found.items()
                   for videos, values in sets.items()}  # fmt: skip
        if arm.name == TEACHER:
            floor = controls(self.real(VALIDATION, arm), self.settings.sizes)
            figures["validation real/short"] = floor["real"]["short"]
        Record(
            name=f"{name}-s0", arm=name, title="what needs no model", group="teacher",
            seed=0, status=DONE, device=self._device_name(), torch=torch.__version__,
            commit=self.commit, source_hash=self.source, figures=rounded(figures),
        ).save(self.settings.results)  # fmt: skip

    def _is_parent(self, arm: Arm) -> bool:
        return any(arm.name == other.parent for other in self.all.values())

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type

    def _gate_note(self, arm: Arm) -> str:
        if arm.group in BEFORE:
            return ""
        if self.settings.ignore_gate:
            return f"ignored: {self.settings.ignore_gate}"
        return "passed"


def missing_data(arm: Arm) -> str:
    """The first folder that a run on a recorded world lacks, or nothing."""
    data = arm.experiment.data
    folders = (data.train, data.heldout, data.codec) if isinstance(data, LatentData) else ()
    return next((str(folder) for folder in folders if not folder.is_dir()), "")


def curves(folder: Path) -> dict[str, list[list[float]]]:
    """Name -> [[update, value], ...] from a run's log; the monitor's under their own names."""
    out: dict[str, list[list[float]]] = {}
    path = folder / "log.jsonl"
    if not path.exists():
        return out
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        kind = line["kind"]
        if kind not in ("monitor", "train"):
            continue
        for name, value in line.items():
            if name in ("kind", "update", "seconds") or (kind == "train" and name not in CURVES):
                continue
            if math.isfinite(value):
                label = name if kind == "monitor" else f"train/{name}"
                out.setdefault(label, []).append([line["update"], float(f"{value:.4g}")])
    return {name: thinned(points) for name, points in out.items()}


def thinned(points: list[list[float]], most: int = 60) -> list[list[float]]:
    """At most so many points, evenly spread, the last one among them."""
    step = math.ceil(len(points) / most)
    return points[::-1][::step][::-1]


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


say: Callable[[str], None] = lambda text: print(f"evidence: {text}", flush=True)  # noqa: E731
