"""The time limit of a call: what a run will take, and telling it in time to save itself."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from aad1.evidence.arms import Arm
from aad1.evidence.results import DONE, Record
from aad1.train.guard import StopFlag
from aad1.train.setup import STAGE_NAMES

SECONDS = {"teacher": 0.08, "ode": 0.25, "dmd": 1.5, "aad": 1.0, "joint": 1.8}
"""Per update on a GPU, until a run of the kind has been timed."""
AROUND = 45.0
"""Seconds of a run beside its updates, until one has been timed."""
LEAST = 90.0
"""Seconds that must be left for a run that will not end in time."""


class OutOfTime(Exception):
    """The next run does not fit into what is left."""


class Clock:
    """One call's time.

    minutes: how long it may take. arms: by name, for the stages of timed runs. known_seconds:
    whether a run that was never timed is taken to last as `SECONDS` says.
    """

    def __init__(self, minutes: float, arms: Mapping[str, Arm], known_seconds: bool = True) -> None:
        self.minutes, self.arms, self.known_seconds = minutes, arms, known_seconds
        self.began = time.monotonic()

    def spent(self) -> float:
        """Minutes since the call began."""
        return (time.monotonic() - self.began) / 60

    def left(self) -> float:
        """Seconds until the limit."""
        return 60 * (self.minutes - self.spent())

    def estimate(self, arm: Arm, records: Mapping[str, Record]) -> float:
        """Seconds that a run takes, from those timed before; a tenth more, for safety."""
        stage = STAGE_NAMES[type(arm.experiment.stage)]
        timed = [
            r
            for r in records.values()
            if r.status == DONE
            and r.updates
            and r.name in self.arms
            and STAGE_NAMES[type(self.arms[r.name].experiment.stage)] == stage
        ]
        if timed:
            same = [r for r in timed if r.arm == arm.key] or timed
            each = max(r.train_seconds / r.updates for r in same)
            return 1.1 * (arm.updates * each + max(r.evaluate_seconds for r in same))
        return arm.updates * SECONDS[stage] + AROUND if self.known_seconds else 0.0

    def check(self, runs: Sequence[Arm], records: Mapping[str, Record], *, first: bool) -> None:
        """OutOfTime if these runs, the last of which is due, do not fit into what is left.

        What is cut off is lost where the folder of runs does not outlast the call, so a run waits
        for a call that it fits into. The first of a call is begun all the same: it would never be
        otherwise.
        """
        left = self.left()
        needed = sum(self.estimate(arm, records) for arm in runs)
        if left < needed and (not first or left < LEAST):
            raise OutOfTime(
                f"{runs[-1].name} needs about {needed:.0f} s, {max(left, 0):.0f} s are left"
            )

    @contextmanager
    def until_the_limit(self, stop: StopFlag, records: Mapping[str, Record]) -> Iterator[None]:
        """Asks a run to save itself while there is still time to measure a finished one."""
        if math.isinf(self.minutes):
            yield
            return

        def ask() -> None:
            stop.name = stop.name or "the time limit"

        # As long as measuring has taken: `estimate` leaves as much.
        measured = [r.evaluate_seconds for r in records.values() if r.evaluate_seconds]
        reserve = 1.1 * max(measured) if measured else AROUND
        timer = threading.Timer(max(1.0, self.left() - reserve), ask)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
