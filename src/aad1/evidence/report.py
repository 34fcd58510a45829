"""docs/evidence.md and its plots, from docs/evidence/*.json and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aad1.atomic import replace_file
from aad1.evaluation.page import number
from aad1.evaluation.plots import Curve, lines
from aad1.evidence import gate
from aad1.evidence.arms import GATE_SEED, TITLES, plan
from aad1.evidence.claims import (
    CLAIMS,
    NOT_RUN,
    Claim,
    Results,
    Verdict,
    controls_problems,
    judge,
)
from aad1.evidence.results import DONE, Record, load_all
from aad1.evidence.statistics import Effect, mean_effect, paired_ratio

COLUMNS = (
    ("M", "short", "M"), ("late M", "short", "late_M"), ("static", "short", "S"),
    ("FDtd", "short", "FDtd"), ("FDnss early", "short", "FDnss_early"),
    ("FDnss late", "short", "FDnss_late"), ("M, 20 s", "long", "M"),
    ("drift ratio, 20 s", "long", "drift_ratio_2s"), ("signed drift, 20 s", "long", "signed_drift"),
)  # fmt: skip
DOOM_COLUMNS = (
    *COLUMNS[:6], ("M, 15 to 20 s", "last", "M"), ("FDtd, 15 to 20 s", "last", "FDtd"),
    ("FDnss late, 15 to 20 s", "last", "FDnss_late"),
)  # fmt: skip
S2_COLUMNS = (
    *COLUMNS[:6], ("subject consistency", "short", "consistency_subject"),
    ("background consistency", "short", "consistency_background"),
    ("likeness to the first frame", "short", "consistency_first_frame"),
    ("colours there late", "oracle", "colors"),
)  # fmt: skip
CONTROLS = (("other real clips", "real"), ("first frame held still", "static"),
            ("contrast fades", "drift-contrast"))  # fmt: skip
CURVES = (("M", "Motion ratio M"), ("heldout_gap", "Logit gap on held-out clips"),
          ("FDtd", "FDtd"), ("FDnss_late", "Late FDnss"))  # fmt: skip
PLOTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("discriminator", "The four discriminators", ("A", "B", "C", "D")),
    ("warm-up", "With and without warm-up, and both at once",
     ("C", "no_warmup", "no_warmup_compute", "joint", "joint_compute")),
    ("weights", "Regulariser weights",
     ("weight_0", "weight_5", "C", "weight_50", "weight_200")),
    ("steps", "Steps, and longer rollouts", ("C", "two_steps", "four_steps", "long_rollout")),
)  # fmt: skip

HEAD = """# Evidence: a trend at small scale

What becomes of the paper's claims in a small drawn world, with a small network, pixels instead of
latents, small batches and few updates. It shows trends, and neither confirms nor refutes the
paper's tables of a 14B model. This page is written by `python runs/evidence_report.py` from
[docs/evidence](evidence), one JSON per run, which `runs/evidence.sh` makes; every number in it
comes from there. The rules by which a claim is judged are code (`aad1.evidence.claims`), fixed
before any run; [evaluation.md](evaluation.md) explains the figures.

**How to read it.** M first: a model that stands still has no drift and near-perfect single frames.
The unit is the training seed; arms of one seed share their start and the order of their clips, so
effects are means over seeds of paired differences or ratios, with 95% t intervals. Videos are
continuations of held-out first frames that neither training nor any choice of settings saw.

**Other than planned**, all settled before any arm ran: frames are 32x32 in patches of 4 with a
texture of half the frequency, not 64x64 (the first teacher lost its shapes there). The teacher's
late FDnss is further from the floor than the three times that were wanted; the gate below says how
far, and asks for the rest all the same. Stage II's scores see the given frame clean, not noised
like the rest ([log.md](log.md)). Regulariser weights are multiples: 20 stands for the full
method's own weight, and 0, 5, 50 and 200 for 0, 1/4, 2.5 and 10 times as much. The penalty's size
says that 20 itself would do next to nothing here. Since the full method's weight was chosen, S1
tests what lies around it, and not the paper's number.
"""


def write(folder: Path, page: Path, prefix: str = "evidence") -> list[Path]:
    """Writes the page and its plots; returns the files. Plots of former runs are removed."""
    records = load_all([folder])
    files = {page: text(records, folder, page.parent, prefix)}
    wanted = plots(records)
    for path in folder.glob("curves-*.svg"):
        if path.name not in wanted:
            path.unlink()
    files |= {folder / name: svg for name, svg in wanted.items()}
    for path, content in files.items():
        with replace_file(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return list(files)


def text(records: Mapping[str, Record], folder: Path, beside: Path, prefix: str) -> str:
    """The page; beside: the folder that it lies in."""
    results, found = Results(records), judge(records)
    place = folder.relative_to(beside).as_posix()
    parts = [HEAD, _state(records, prefix), _verdicts(found, records), _gate(folder)]
    parts.append(_controls(records))
    parts += [_claim(claim, found[claim.name], results) for claim in CLAIMS]
    parts += [_stages(results), _long(results), _external(results), _curves(records, place)]
    parts += [_samples(records, place), _runs(records)]
    return "\n".join(part for part in parts if part)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines_ = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines_ + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _value(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else number(value)


def _effect(effect: Effect) -> str:
    return f"{number(effect.value)} [{number(effect.low)}, {number(effect.high)}]"


def _state(records: Mapping[str, Record], prefix: str) -> str:
    arms = plan(prefix)
    done = sum(a.name in records and records[a.name].status != "failed" for a in arms)
    devices = sorted({r.device for r in records.values() if r.device})
    minutes = sum(r.train_seconds + r.evaluate_seconds for r in records.values()) / 60
    state = f"**State: {done} of {len(arms)} planned runs are there"
    if records:
        state += f"; {minutes:.0f} minutes with all trials, on {', '.join(devices)}"
    return state + ".**\n"


def _verdicts(found: Mapping[str, Verdict], records: Mapping[str, Record]) -> str:
    rows = []
    void = ""
    judged = any(own.status != NOT_RUN for own in found.values())
    if judged and controls_problems(records.get("controls-s0")):
        void = (
            "\n**No verdict counts as long as the controls do not behave as they must (below).**\n"
        )
    for claim in CLAIMS:
        own = found[claim.name]
        missing = f": {', '.join(own.missing)}" if own.missing else ""
        effects = "; ".join(f"{name} {_effect(e)}" for name, e in own.effects.items())
        rows.append([claim.name, claim.says, f"**{own.status}**{missing}", effects or "-"])
    return _table(["", "Claim", "Verdict", "Effects [95%]"], rows) + void


def _gate(folder: Path) -> str:
    head = "## The gate\n\nNo arm runs before the full method beats its own stage II start on FDtd "
    head += "and FDnss with M in 0.9 to 1.1, on validation clips and at a fixed last update.\n\n"
    found = gate.read(folder)
    parts = [_judged(found) if found else "Not run yet with the present settings.\n"]
    if former := gate.former(folder):
        parts += ["With earlier settings:\n", *map(_judged, former)]
    return head + "\n".join(parts)


def _judged(found: Mapping[str, Any]) -> str:
    lines_ = [f"{'Passed' if found['passed'] else 'Not passed'}, settings {found['settings']}, "
              f"after {found['updates']} updates.", ""]  # fmt: skip
    rows = [[name, _value(before), _value(after)]
            for name, (before, after) in found["stage II, full method"].items()]  # fmt: skip
    lines_.append(_table(["", "stage II", "full method"], rows))
    lines_ += [f"- {warning}" for warning in found["warnings"]]
    return "\n".join(lines_) + "\n"


def _controls(records: Mapping[str, Record]) -> str:
    head = "## Controls\n\n"
    record = records.get("controls-s0")
    if record is None:
        return head + "Not measured yet.\n"
    rows = [
        [title, *(_value(record.value(f"{control}/{videos}", name)) for _, videos, name in COLUMNS)]
        for title, control in CONTROLS
    ]
    problems = controls_problems(record)
    state = (
        "They behave as they must."
        if not problems
        else "**Void: the controls do not behave as they must**: not so that "
        + "; not so that ".join(problems) + "."
    )  # fmt: skip
    return head + _table(["", *(label for label, _, _ in COLUMNS)], rows) + f"\n{state}\n"


def _claim(claim: Claim, own: Verdict, results: Results) -> str:
    parts = [f"## {claim.name}: {claim.says}\n", f"**{own.status}**\n"]
    if own.status == NOT_RUN:
        parts.append(f"Seeds still missing: {', '.join(own.missing)}.\n")
    else:
        marks = [f"- {'met' if met else 'not met'}: {name}" for name, met in own.conditions.items()]
        parts.append("\n".join(marks) + "\n")
        rows = [[name, _effect(e), f"{e.p:.3g}", str(len(e.seeds))]
                for name, e in own.effects.items()]  # fmt: skip
        if rows:
            parts.append(_table(["Effect", "[95%]", "p", "seeds"], rows))
        parts += [f"- {note}" for note in own.notes]
        if own.notes:
            parts.append("")
    more = {"P4": ("no_warmup_compute",), "S3": ("two_steps",), "S4": ("joint_compute",)}
    columns = S2_COLUMNS if claim.name == "S2" else COLUMNS
    parts.append(arm_table([*claim.arms, *more.get(claim.name, ())], results, columns))
    return "\n".join(parts)


def arm_table(
    arms: Sequence[str], results: Results, columns: Sequence[tuple[str, str, str]] = COLUMNS
) -> str:
    """One row per finished seed and one with the arm's mean and interval."""
    rows = []
    for arm in arms:
        runs = results.of(arm)
        for seed, record in sorted(runs.items()):
            values = (record.value(videos, name) for _, videos, name in columns)
            told = [_value(v) for v in values] if record.status == DONE else [record.status]
            told += ["-"] * (len(columns) - len(told))
            rows.append([f"{arm}, seed {seed}", *told])
        if len(runs) > 1:
            means = (mean_effect(results.figure(arm, name, v)) for _, v, name in columns)
            rows.append([f"**{arm}**", *("-" if m is None else _effect(m) for m in means)])
    if not rows:
        return ""
    named = ", ".join(f"{arm}: {TITLES[arm]}" for arm in arms)
    return _table(["", *(label for label, _, _ in columns)], rows) + f"\n{named}.\n"


def _stages(results: Results) -> str:
    table = arm_table(["teacher", "stage1", "stage2", "C"], results)
    return "## The stages\n\n" + (table or "Not run yet.\n")


def _long(results: Results) -> str:
    head = (
        "## Beyond the paper: longer rollouts in training (exploratory)\n\n"
        "Stage III on self-rollouts of twice a clip's length, the discriminator seeing a random "
        "stretch; ratios to the full method at equal generator updates. The authors name drift "
        "beyond the training clip as a limit.\n\n"
    )
    rows = []
    for videos, label in (("long", "81 frames"), ("longest", "161 frames")):
        for name in ("M", "drift_2s", "FDnss_late"):
            ratio = paired_ratio(
                results.figure("long_rollout", name, videos), results.figure("C", name, videos)
            )
            if ratio is not None:
                rows.append([f"{name}, {label}", _effect(ratio), str(len(ratio.seeds))])
    if not rows:
        return head + "Not run yet.\n"
    return head + _table(["Ratio", "[95%]", "seeds"], rows)


def _external(results: Results) -> str:
    head = (
        "## On the game world\n\nThe headline arms on doom, against real clips as the codec shows "
        "them; the last 5 s of rollouts of 20 s beside the first 5.\n\n"
    )
    arms = ("doom_teacher", "doom_stage1", "doom_stage2", "doom_A", "doom_C", "doom_no_warmup")
    table = arm_table(arms, results, DOOM_COLUMNS)
    return head + (table or "Not run yet.\n")


# ---- plots and pictures -------------------------------------------------------------------------


def plots(records: Mapping[str, Record]) -> dict[str, str]:
    """File name -> SVG of the learning curves: mean over seeds, band from least to most."""
    results = Results(records)
    out = {}
    for group, _, arms in PLOTS:
        for name, title in CURVES:
            curves: dict[str, Curve] = {}
            for arm in arms:
                curve = _curve([r.curves.get(name, []) for r in results.of(arm).values()])
                if curve is not None:
                    own = "20" if (group, arm) == ("weights", "C") else arm
                    curves[own.removeprefix("weight_")] = curve
            if curves:
                label = f"{title} over generator updates: mean, least to most of the seeds"
                out[f"curves-{group}-{name}.svg"] = lines(curves, title=label) + "\n"
    return out


def _curve(runs: Sequence[Sequence[Sequence[float]]]) -> Curve | None:
    """At the updates that all runs with the curve have."""
    tables = [{point[0]: point[1] for point in run} for run in runs if run]
    if not tables:
        return None
    shared = sorted(set.intersection(*(set(t) for t in tables)))
    if len(shared) < 2:
        return None
    values = [[t[update] for t in tables] for update in shared]
    return (
        shared, [sum(v) / len(v) for v in values], [min(v) for v in values],
        [max(v) for v in values],
    )  # fmt: skip


def _curves(records: Mapping[str, Record], place: str) -> str:
    made = plots(records)
    parts = ["## Learning curves\n"]
    for group, title, _ in PLOTS:
        files = [f"curves-{group}-{name}.svg" for name, _ in CURVES]
        shown = [f"![{file}]({place}/{file})" for file in files if file in made]
        parts.append(f"{title}:\n\n" + ("\n".join(shown) or "not run yet.") + "\n")
    return "\n".join(parts)


def _samples(records: Mapping[str, Record], place: str) -> str:
    head = "## Samples\n\nThe first 16 of each arm's seed 0, not chosen; a row is one video.\n\n"
    shown = []
    for r in records.values():
        if r.samples and r.seed in (0, GATE_SEED):
            trial = "" if r.name == f"{r.arm}-s{r.seed}" else f" (a trial, discarded: {r.name})"
            shown.append(f"- [{r.title}]({place}/{r.samples}){trial}")
    return head + ("\n".join(shown) or "None yet.") + "\n"


def _runs(records: Mapping[str, Record]) -> str:
    head = (
        "## All runs\n\nFailed ones and trials of other settings included; trials that were only "
        "watched in training are in [log.md](log.md).\n\n"
    )
    if not records:
        return head + "None yet.\n"
    rows = []
    for r in records.values():
        told = r.status + (f": {r.error[:80]}" if r.error else "")
        told += f" (after {len(r.earlier)} failed attempts)" if r.earlier else ""
        gate_ = f"; gate {r.gate}" if r.gate and r.gate != "passed" else ""
        minutes = (r.train_seconds + r.evaluate_seconds) / 60
        rows.append([
            r.name, told + gate_, str(r.updates), f"{minutes:.1f}",
            _value(r.value("short", "M")), _value(r.value("short", "FDtd")),
            _value(r.value("short", "FDnss_late")), r.settings_hash[:6], r.commit[:8] or "-",
        ])  # fmt: skip
    return (
        head
        + _unpaired(records)
        + _table(
            ["Run", "State", "Updates", "Minutes", "M", "FDtd", "FDnss late", "Settings", "Commit"],
            rows,
        )
    )


def _unpaired(records: Mapping[str, Record]) -> str:
    """Which runs did not start from the very weights of their partners; usually nothing."""
    starts: dict[str, dict[str, list[str]]] = {}
    for r in records.values():
        if r.start:
            starts.setdefault(r.parent, {}).setdefault(r.start, []).append(r.name)
    told = [
        f"- **Not exact partners**: the weights of {parent} were made again, and not the same; "
        + "; ".join(f"{', '.join(names)} from {sha[:8]}" for sha, names in sorted(some.items()))
        + "."
        for parent, some in sorted(starts.items())
        if len(some) > 1
    ]
    return "\n".join([*told, "", ""]) if told else ""
