"""The paper's claims and the rules by which they are judged, fixed before any arm was run.

A verdict is one of

    reproduced      every condition of the rule is met
    inconclusive    the interval of the deciding effect holds both "no effect" and the threshold
    partly          some conditions are met
    not reproduced  none is, but for those that hold by themselves where there is no effect at all

and "not run yet" as long as an arm that the rule needs lacks seeds. Thresholds and figures are
those of the rule alone; what else the data show may be told, but as exploratory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from aad1.evidence.results import DIVERGED, DONE, Record
from aad1.evidence.statistics import (
    Effect,
    fisher,
    holm,
    mean_effect,
    paired_difference,
    paired_ratio,
)

REPRODUCED, PARTLY, NOT = "reproduced", "partly", "not reproduced"
INCONCLUSIVE, NOT_RUN = "inconclusive", "not run yet"
STATIC_M, STATIC_SHARE = 0.25, 0.5
"""A model has collapsed at M up to the one, or a share of static videos from the other on."""
MOVES = 0.6
"""Drift and consistency count only for arms whose M is at least this."""
SIGNIFICANT = 0.05
PRIMARY = ("P1", "P2", "P3")
"""Their p-values are adjusted together (Holm); the other claims are secondary."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the data say of a claim."""

    claim: str
    status: str
    conditions: Mapping[str, bool]
    effects: Mapping[str, Effect]
    notes: tuple[str, ...] = ()
    p: float | None = None
    """Of the deciding effect, before adjustment."""
    missing: tuple[str, ...] = ()


class Results:
    """The arms' figures by seed."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        self.records = {r.name: r for r in records.values()}

    def of(self, arm: str) -> dict[int, Record]:
        """Finished runs of an arm by seed, those that diverged included."""
        return {
            r.seed: r
            for r in self.records.values()
            if r.name == f"{arm}-s{r.seed}" and r.arm == arm and r.status in (DONE, DIVERGED)
        }

    def figure(self, arm: str, name: str, videos: str = "short") -> dict[int, float]:
        """A figure by seed, of the runs that have it."""
        found = {s: r.value(videos, name) for s, r in self.of(arm).items()}
        return {s: v for s, v in found.items() if v is not None and math.isfinite(v)}

    def missing(self, arms: Sequence[str], seeds: int) -> list[str]:
        """Arms with fewer finished seeds than a rule needs, as "A (2 of 4)"."""
        counts = {arm: len(self.of(arm)) for arm in arms}
        return [f"{arm} ({n} of {seeds})" for arm, n in counts.items() if n < seeds]

    def diverged(self, arm: str) -> int:
        return sum(r.status == DIVERGED for r in self.of(arm).values())

    def collapsed(self, arm: str) -> dict[int, bool]:
        """By seed, whether its videos stand still; of runs that did not diverge."""
        motion, static = self.figure(arm, "M"), self.figure(arm, "S")
        return {s: motion[s] <= STATIC_M or static.get(s, 0.0) >= STATIC_SHARE for s in motion}

    def moves(self, arm: str) -> dict[int, bool]:
        """By seed, whether drift counts."""
        return {s: m >= MOVES for s, m in self.figure(arm, "M").items()}


def verdict(
    claim: str,
    conditions: Mapping[str, bool],
    effects: Mapping[str, Effect | None],
    deciding: str,
    threshold: float,
    notes: Sequence[str] = (),
    guards: Sequence[str] = (),
) -> Verdict:
    """By the general rule at the top.

    deciding: name of the effect whose interval decides. guards: beginnings of conditions that say
    what must not happen besides; by themselves they make nothing "partly" reproduced.
    """
    known = {name: effect for name, effect in effects.items() if effect is not None}
    effect = known.get(deciding)
    if all(conditions.values()):
        status = REPRODUCED
    elif effect is None or (effect.spans(effect.null) and effect.spans(threshold)):
        status = INCONCLUSIVE
    else:
        met = any(v for name, v in conditions.items() if not name.startswith(tuple(guards)))
        status = PARTLY if met else NOT
    return Verdict(
        claim=claim, status=status, conditions=dict(conditions), effects=known,
        notes=tuple(notes), p=None if effect is None else effect.p,
    )  # fmt: skip


def _above(effect: Effect | None, value: float) -> bool:
    return effect is not None and effect.low > value


def _below(effect: Effect | None, value: float) -> bool:
    return effect is not None and effect.high < value


def _mean(values: Mapping[int, float]) -> float:
    return math.fsum(values.values()) / len(values) if values else math.nan


def _divergences(r: Results, arms: Sequence[str]) -> list[str]:
    return [f"{r.diverged(arm)} of {len(r.of(arm))} seeds of {arm} diverged"
            for arm in arms if r.diverged(arm)]  # fmt: skip


def p1(r: Results) -> Verdict:
    """Causal, frame-wise: motion collapse."""
    a, c = r.collapsed("A"), r.collapsed("C")
    effect = paired_difference(r.figure("C", "M"), r.figure("A", "M"))
    conditions = {
        "A stands still in at least 3 of 4 seeds": sum(a.values()) >= 3,
        "C in none": len(c) > 0 and not any(c.values()),
        "M of C less M of A: interval above 0.3": _above(effect, 0.3),
    }
    p = fisher(sum(a.values()), len(a), sum(c.values()), len(c)) if a and c else math.nan
    notes = [f"stand still: A {sum(a.values())} of {len(a)}, C {sum(c.values())} of {len(c)} "
             f"(Fisher p {p:.3f})"]  # fmt: skip
    effects = {"M of C less M of A": effect}
    return verdict("P1", conditions, effects, "M of C less M of A", 0.3,
                   [*notes, *_divergences(r, "AC")], ["C in none"])  # fmt: skip


def p2(r: Results) -> Verdict:
    """Causal, video-wise: moves, but drifts."""
    moves = r.moves("B")
    drift = {arm: r.figure(arm, "drift_2s", "long") for arm in "BC"}
    c_moves = r.moves("C")
    comparable = {arm: {s: v for s, v in drift[arm].items() if own.get(s)}
                  for arm, own in (("B", moves), ("C", c_moves))}  # fmt: skip
    ratio = paired_ratio(comparable["B"], comparable["C"])
    signed = mean_effect(
        {s: v for s, v in r.figure("B", "signed_drift", "long").items() if moves.get(s)}
    )
    conditions = {
        "B has M of at least 0.6 in at least 3 of 4 seeds": sum(moves.values()) >= 3,
        "drift of B over C at 81 frames at least 1.25, interval above 1": (
            ratio is not None and ratio.value >= 1.25 and ratio.low > 1
        ),
        "signed drift of B: interval without 0": signed is not None and not signed.spans(0),
    }
    effects = {"drift of B over C": ratio, "signed drift of B": signed}
    notes = [] if ratio else ["drift counts only where M is at least 0.6: too few such seeds"]
    return verdict("P2", conditions, effects, "drift of B over C", 1.25,
                   [*notes, *_divergences(r, "BC")], ["B has M"])  # fmt: skip


def p3(r: Results) -> Verdict:
    """Bidirectional, video-wise: best of the four."""
    arms = "ABCD"
    distances = {n: {arm: _mean(r.figure(arm, n)) for arm in arms} for n in ("FDtd", "FDnss_late")}
    m = _mean(r.figure("C", "M"))
    effects: dict[str, Effect | None] = {}
    better = []
    for arm in "ABD":
        own, c = r.figure(arm, "drift_2s", "long"), r.figure("C", "drift_2s", "long")
        moving = {s: v for s, v in own.items() if r.moves(arm).get(s)}
        effects[f"drift of {arm} over C"] = ratio = paired_ratio(moving, c)
        if _below(ratio, 1):
            better.append(arm)
    others = [arm for arm in "ABD" if math.isfinite(distances["FDtd"][arm])]
    # The p-value that is adjusted with those of P1 and P2: C against the next best arm.
    nearest = min(others, key=lambda arm: distances["FDtd"][arm], default="")
    if nearest:
        key = f"FDtd of {nearest} over C"
        effects[key] = paired_ratio(r.figure(nearest, "FDtd"), r.figure("C", "FDtd"))
    conditions = {"C has a mean M in 0.75 to 1.25": 0.75 <= m <= 1.25}
    for name, means in distances.items():
        finite = {arm: v for arm, v in means.items() if math.isfinite(v)}
        conditions[f"C has the lowest mean {name} of A to D"] = (
            len(finite) > 1 and min(finite, key=lambda arm: finite[arm]) == "C"
        )
    conditions["no arm with M of at least 0.6 drifts less (interval below 1)"] = not better
    deciding = f"FDtd of {nearest} over C"
    found = verdict("P3", conditions, effects, deciding, 1.0, _divergences(r, arms))
    # The rule asks for ranks, not for a difference: an interval that holds 1 decides nothing here.
    lowest = [met for name, met in conditions.items() if name.startswith("C has the lowest")]
    if found.status != REPRODUCED and nearest:
        found = replace(found, status=PARTLY if any(lowest) else NOT)
    return found


def p4(r: Results) -> Verdict:
    """Without the DMD warm-up: worse frames."""
    ratio = paired_ratio(r.figure("no_warmup", "FDnss_late"), r.figure("C", "FDnss_late"))
    equal = paired_ratio(r.figure("no_warmup_compute", "FDnss_late"), r.figure("C", "FDnss_late"))
    deciding = "FDnss late without warm-up over with, equal updates"
    conditions = {
        "FDnss late at least 1.5 times that of the full method, interval above 1": (
            ratio is not None and ratio.value >= 1.5 and ratio.low > 1
        )
    }
    effects = {deciding: ratio, "the same at equal compute": equal}
    notes = [f"{r.diverged(arm)} of {len(r.of(arm))} seeds of {arm} diverged"
             for arm in ("no_warmup", "no_warmup_compute", "C")]  # fmt: skip
    return verdict("P4", conditions, effects, deciding, 1.5, notes)


def _score(r: Results, arm: str) -> float:
    """Geometric mean of FDtd and late FDnss over the seeds."""
    values = [*r.figure(arm, "FDtd").values(), *r.figure(arm, "FDnss_late").values()]
    if not values or min(values) <= 0:
        return math.inf
    return math.exp(math.fsum(map(math.log, values)) / len(values))


WEIGHTS = {0: "weight_0", 5: "weight_5", 20: "C", 50: "weight_50", 200: "weight_200"}
"""Weight on the paper's scale -> arm; the full method's own weight, which is 20 there."""


def s1(r: Results) -> Verdict:
    """Regulariser weight: 0 collapses, 20 is good, 50 is too much."""
    weights = tuple(WEIGHTS)
    scores = {w: _score(r, arm) for w, arm in WEIGHTS.items()}
    best = min(scores, key=lambda w: scores[w])
    means = [_mean(r.figure(arm, "FDtd")) for arm in WEIGHTS.values()]
    best_td = min(filter(math.isfinite, means), default=math.inf)  # NaN: every seed diverged
    bad = 0
    collapsed, td = r.collapsed("weight_0"), r.figure("weight_0", "FDtd")
    for seed, record in r.of("weight_0").items():
        bad += (
            record.status == DIVERGED
            or collapsed.get(seed, False)
            or td.get(seed, 0.0) >= 2 * best_td
        )
    motion = paired_difference(r.figure("weight_50", "M"), r.figure("C", "M"))
    frames = paired_ratio(r.figure("weight_50", "FDnss_late"), r.figure("C", "FDnss_late"))
    conditions = {
        "0 collapses, diverges, or has twice the best FDtd in at least 2 of 3 seeds": bad >= 2,
        "20 is within 10% of the best weight": (
            math.isfinite(scores[20]) and scores[20] <= 1.1 * scores[best]
        ),
        "50 moves less or has a higher FDnss than 20, by interval": (
            _below(motion, 0) or _above(frames, 1)
        ),
    }
    effects = {"FDnss late of 50 over 20": frames, "M of 50 less M of 20": motion}
    found = verdict("S1", conditions, effects, "FDnss late of 50 over 20", 1.0,
                    [f"best weight by FDtd and late FDnss: {best}"])  # fmt: skip
    if found.status != REPRODUCED:
        interior = best not in (weights[0], weights[-1])
        found = replace(found, status=PARTLY if interior or any(conditions.values()) else NOT)
    return found


def s2(r: Results) -> Verdict:
    """Stage III trades motion for consistency."""
    motion = paired_difference(r.figure("stage2", "M"), r.figure("C", "M"))
    # Standing still is perfectly consistent: as drift, it counts only where both move.
    still = {s for arm in ("C", "stage2") for s, moves in r.moves(arm).items() if not moves}
    own, start = (
        {s: v for s, v in r.figure(arm, "consistency_subject").items() if s not in still}
        for arm in ("C", "stage2")
    )
    consistency = paired_difference(own, start)
    colors = paired_difference(r.figure("C", "colors", "oracle"), r.figure("stage2", "colors",
                                                                           "oracle"))  # fmt: skip
    conditions = {
        "M falls from stage II to III, by interval": _above(motion, 0),
        "subject consistency rises, by interval": _above(consistency, 0),
        "and the named colours are there more often late, by interval": _above(colors, 0),
    }
    effects = {
        "M of II less M of III": motion,
        "consistency of III less that of II": consistency,
        "share of colours of III less that of II": colors,
    }
    notes = ["without the third condition it is the trade of motion for consistency alone"]
    return verdict("S2", conditions, effects, "M of II less M of III", 0.0, notes)


def s3(r: Results) -> Verdict:
    """One step is as good as four."""
    ratios = {
        f"{n} of 1 step over 4 steps": paired_ratio(r.figure("C", n), r.figure("four_steps", n))
        for n in ("FDtd", "FDnss_late")
    }
    conditions = {f"{name}: interval up to at most 1.25": e is not None and e.high <= 1.25
                  for name, e in ratios.items()}  # fmt: skip
    times = {arm: [x.facts.get("seconds_per_chunk", math.nan) for x in r.of(arm).values()]
             for arm in ("C", "two_steps", "four_steps")}  # fmt: skip
    notes = [
        f"{label}: {1000 * sum(t) / len(t):.1f} ms per chunk, cache pass included"
        for label, t in zip(("1 step", "2 steps", "4 steps"), times.values(), strict=True)
        if t and all(math.isfinite(x) for x in t)
    ]
    deciding = max(
        (n for n, e in ratios.items() if e), key=lambda n: ratios[n].high, default=""  # type: ignore[union-attr]
    )  # fmt: skip
    return verdict("S3", conditions, ratios, deciding, 1.25, notes)


def s4(r: Results) -> Verdict:
    """One loss after the other, against both at once."""
    ratios = {
        f"{n} of joint over staged": paired_ratio(r.figure("joint", n), r.figure("C", n))
        for n in ("FDnss_late", "FDtd")
    }
    known = [e for e in ratios.values() if e is not None]
    staged = {f"{name} at least 1.25, interval above 1": e is not None and e.value >= 1.25
              and e.low > 1 for name, e in ratios.items()}  # fmt: skip
    reverse = len(known) == 2 and all(e.value <= 1 / 1.25 and e.high < 1 for e in known)
    equal = {
        f"{n}, equal compute": paired_ratio(r.figure("joint_compute", n), r.figure("C", n))
        for n in ("FDnss_late", "FDtd")
    }
    notes = [f"{r.diverged(arm)} of {len(r.of(arm))} seeds of {arm} diverged"
             for arm in ("joint", "joint_compute", "C")]  # fmt: skip
    status = REPRODUCED if all(staged.values()) else NOT if reverse else INCONCLUSIVE
    if reverse:
        notes.append("the reverse holds: both at once is better")
    effects = {n: e for n, e in {**ratios, **equal}.items() if e is not None}
    return Verdict(claim="S4", status=status, conditions=staged, effects=effects,
                   notes=tuple(notes), p=known[0].p if known else None)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper and what its rule needs."""

    name: str
    says: str
    arms: tuple[str, ...]
    seeds: int
    rule: Callable[[Results], Verdict]


CLAIMS: tuple[Claim, ...] = (
    Claim(name="P1", says="A causal, frame-wise discriminator lets motion collapse.",
          arms=("A", "C"), seeds=4, rule=p1),
    Claim(name="P2", says="A causal, video-wise one keeps motion, but long rollouts drift.",
          arms=("B", "C"), seeds=4, rule=p2),
    Claim(name="P3", says="A bidirectional, video-wise one is best.",
          arms=("A", "B", "C", "D"), seeds=4, rule=p3),
    Claim(name="P4", says="Without the DMD warm-up, adversarial training is worse.",
          arms=("C", "no_warmup"), seeds=4, rule=p4),
    Claim(name="S1", says="The regulariser: 0 collapses, 20 is good, 50 is too much.",
          arms=tuple(WEIGHTS.values()), seeds=3, rule=s1),
    Claim(name="S2", says="Stage III gives up some motion for consistency.",
          arms=("stage2", "C"), seeds=4, rule=s2),
    Claim(name="S3", says="One step is as good as four.", arms=("C", "four_steps"), seeds=3,
          rule=s3),
    Claim(name="S4", says="DMD first and then GAN is better than both at once.",
          arms=("C", "joint"), seeds=3, rule=s4),
)  # fmt: skip


def judge(records: Mapping[str, Record]) -> dict[str, Verdict]:
    """All verdicts by claim. P1 to P3 need a Holm-adjusted p below 0.05 to be reproduced, where
    their rule has a significance test (P1, P2)."""
    results = Results(records)
    found: dict[str, Verdict] = {}
    for claim in CLAIMS:
        missing = results.missing(claim.arms, claim.seeds)
        if missing:
            found[claim.name] = Verdict(
                claim=claim.name, status=NOT_RUN, conditions={}, effects={},
                missing=tuple(missing),
            )  # fmt: skip
        else:
            found[claim.name] = claim.rule(results)
    raw = {n: found[n].p for n in PRIMARY}
    adjusted = holm({n: 1.0 if p is None else p for n, p in raw.items()})
    for name in PRIMARY:
        own = found[name]
        if own.status == NOT_RUN:
            continue
        note = f"p of the deciding effect, Holm-adjusted over P1 to P3: {adjusted[name]:.3g}"
        own = replace(own, notes=(*own.notes, note))
        # Claims not yet run count with p = 1, so a verdict can only get firmer when they are.
        if name != "P3" and own.status == REPRODUCED and adjusted[name] >= SIGNIFICANT:
            own = replace(own, status=PARTLY)
        found[name] = own
    return found


def controls_problems(record: Record | None) -> list[str]:
    """How the controls behave otherwise than they must; a run whose controls do so is void."""
    if record is None:
        return ["the controls were not measured yet"]
    problems = []

    def value(control: str, figure: str, videos: str = "short") -> float:
        found = record.value(f"{control}/{videos}", figure)
        return math.nan if found is None else found

    checks = {
        "other real clips have M in 0.9 to 1.1": 0.9 <= value("real", "M") <= 1.1,
        "held-still clips have M below 0.05": value("static", "M") < 0.05,
        "held-still clips are all static": value("static", "S") == 1,
        "held-still clips have a far larger FDtd than real ones": (
            value("static", "FDtd") > 10 * value("real", "FDtd")
        ),
        "fading clips have a larger late FDnss than real ones": (
            value("drift-contrast", "FDnss_late") > 3 * value("real", "FDnss_late")
        ),
        "fading clips drift more than real ones": (
            value("drift-contrast", "signed_drift", "long") > value("real", "signed_drift", "long")
        ),
    }
    problems += [name for name, met in checks.items() if not met]
    return problems
