"""The gate before the ablations, and trials of settings that may precede it.

No ablation runs before the full method beats its own stage II start on FDtd and FDnss, with M in
0.9 to 1.1, at a fixed last update, on validation clips that no arm is judged on. What was tried to
get there stays in the results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from aad1.atomic import replace_file
from aad1.errors import UserError
from aad1.evidence.arms import TEACHER, Arm
from aad1.evidence.results import DONE, Record, say
from aad1.train.config import Experiment
from aad1.train.record import from_plain, to_plain
from aad1.train.setup import STAGE_NAMES

FILE = "gate.json"
MOTION = (0.9, 1.1)
BETTER = ("FDtd", "FDnss_late")
TEACHER_FLOORS = 3.0
"""The teacher's FDnss may be so many times the floor."""


def judge(
    start: Record, full: Record, teacher: Record | None, floor: Record | None, settings: str
) -> dict[str, Any]:
    """What the gate says of the full method against its own start; plain data.

    teacher, floor: results of the teacher and of the controls, which tell whether the teacher is
    good enough to begin with; that is told, and decides nothing.
    """
    conditions: dict[str, bool] = {}
    numbers: dict[str, Any] = {}
    m = full.value("short", "M")
    conditions[f"M in {MOTION[0]} to {MOTION[1]}"] = m is not None and MOTION[0] <= m <= MOTION[1]
    for name in (*BETTER, "FDnss_early", "M"):
        numbers[name] = [r.value("short", name) for r in (start, full)]
    for name in BETTER:
        before, after = numbers[name]
        conditions[f"{name} below stage II's"] = (
            before is not None and after is not None and after < before
        )
    warnings = []
    if teacher is not None and floor is not None:
        m = teacher.value("validation", "M")
        distance = teacher.value("validation", "FDnss_late")
        least = floor.value("validation real/short", "FDnss_late")
        if m is None or not MOTION[0] <= m <= MOTION[1]:
            warnings.append(f"the teacher's M is {m}, outside {MOTION[0]} to {MOTION[1]}")
        if distance is None or least is None or distance > TEACHER_FLOORS * least:
            warnings.append(
                f"the teacher's FDnss is {distance}, above {TEACHER_FLOORS:g} times the floor "
                f"{least}"
            )
    return {
        "passed": all(conditions.values()),
        "conditions": conditions,
        "stage II, full method": numbers,
        "warnings": warnings,
        "settings": settings,
        "commit": full.commit,
        "source_hash": full.source_hash,
        "updates": full.updates,
    }


def write(gate: dict[str, Any], folder: Path, name: str = FILE) -> None:
    """Writes the gate's file."""
    with replace_file(folder / name) as temporary:
        temporary.write_text(json.dumps(gate, indent=1) + "\n", encoding="utf-8")


def read(folder: Path, name: str = FILE) -> dict[str, Any] | None:
    """The gate's file; None if it was not tried yet. UserError if it cannot be read."""
    path = folder / name
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["passed"], bool):
            raise ValueError("passed must be true or false")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    assert isinstance(found, dict)
    return found


def found_or_judged(
    folders: Sequence[Path], arms: Iterable[Arm], records: Mapping[str, Record], settings: str
) -> dict[str, Any] | None:
    """The gate's file for these settings from one of the folders; else it is judged and written to
    the first, if both runs that it needs are there. None if they are not.
    """
    for folder in folders:
        found = read(folder)
        if found is not None and found["settings"] == settings:
            return found
    full = next((a for a in arms if a.key == "gate-C" and not a.label), None)
    if full is None:
        return None
    pair = [records.get(name) for name in (full.parent, full.name)]
    if any(r is None or r.status != DONE for r in pair):
        return None
    start, own = (r for r in pair if r is not None)
    found = judge(start, own, records.get(TEACHER), records.get("controls-s0"), settings)
    write(found, folders[0])
    say(f"gate: {'passed' if found['passed'] else 'closed'} {found['conditions']}")
    return found


def former(folder: Path) -> list[dict[str, Any]]:
    """Gates that were judged with settings which changed since (`gate-HASH.json`)."""
    files = sorted(folder.glob(f"gate-{'[0-9a-f]' * 6}.json"))
    return [found for path in files if (found := read(folder, path.name)) is not None]


# ---- trials of other settings -------------------------------------------------------------------


def trial(arms: Sequence[Arm], label: str, overrides: Sequence[str]) -> list[Arm]:
    """The runs up to the gate with other settings, as in "aad.optim.lr=1e-5".

    A run whose settings, or whose parent's, change carries the label in its name; the others are
    those of the plan. UserError for a stage or field that is not there.
    """
    if not label.replace("_", "").isalnum():
        raise UserError(f"--label must be letters, digits and underscores, got {label!r}")
    changes: dict[str, list[tuple[list[str], Any]]] = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        stage, *path = name.split(".")
        if not equals or not path or stage not in STAGE_NAMES.values():
            raise UserError(
                f"--override must be STAGE.FIELD=VALUE with a stage of "
                f"{', '.join(STAGE_NAMES.values())}, got {text!r}"
            )
        # YAML reads 1e-5 as text, so numbers are tried first.
        changes.setdefault(stage, []).append((path, _value(value)))
    renamed: dict[str, str] = {}
    out = []
    for arm in arms:
        if arm.group not in ("teacher", "gate"):
            continue
        e = arm.experiment
        for path, value in changes.get(STAGE_NAMES[type(e.stage)], []):
            e = _changed(e, path, value)
        parent = renamed.get(arm.parent, arm.parent)
        if e != arm.experiment or parent != arm.parent:
            new = replace(arm, experiment=e, parent=parent, label=label)
            renamed[arm.name] = new.name
            arm = new
        out.append(arm)
    if not renamed:
        raise UserError("the overrides change nothing")
    return out


def _value(text: str) -> Any:
    try:
        return float(text) if not text.lstrip("-").isdigit() else int(text)
    except ValueError:
        return yaml.safe_load(text)


def _changed(e: Experiment, path: list[str], value: Any) -> Experiment:
    plain = to_plain(e)
    place = plain
    for name in path[:-1]:
        if not isinstance(place.get(name), dict):
            raise UserError(f"--override: {e.name} has no {'.'.join(path)}")
        place = place[name]
    if path[-1] not in place:
        raise UserError(f"--override: {e.name} has no {'.'.join(path)}")
    place[path[-1]] = value
    found = from_plain(Experiment, plain, "override")
    assert isinstance(found, Experiment)
    return found
