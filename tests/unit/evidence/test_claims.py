"""Planted results: what each rule must say of them."""

from __future__ import annotations

from typing import Any

import pytest

from aad1.evidence.claims import CLAIMS, WEIGHTS, controls_problems, judge
from aad1.evidence.results import Record

GOOD = {"M": 1.0, "S": 0.0, "FDtd": 4.0, "FDnss_late": 4.0, "consistency_subject": 0.8}
LONG = {"M": 1.0, "drift_2s": 0.2, "signed_drift": 0.05}
JITTER = (1.00, 1.02, 0.98, 1.01)


def arm(
    key: str, seeds: int = 4, spread: bool = False, long: dict[str, float] | None = None,
    **figures: Any,
) -> dict[str, Record]:  # fmt: skip
    """Records of an arm whose figures differ a little from seed to seed; lists give each seed."""
    out = {}
    for seed in range(seeds):

        def at(value: Any, seed: int = seed) -> float:
            if isinstance(value, list):
                return float(value[seed])
            # Another pattern for each arm, so that pairs differ.
            return float(value) * JITTER[(seed + len(key)) % 4]

        short = {n: at(v) for n, v in (GOOD | figures).items()}
        record = Record(
            name=f"{key}-s{seed}", arm=key, title=key, group="", seed=seed, status="done",
            figures={
                "short": short, "long": {n: at(v) for n, v in (LONG | (long or {})).items()},
                "oracle": {"colors": at(figures.get("colors", 0.8))},
            },
            facts={"seconds_per_chunk": 0.01},
        )  # fmt: skip
        out[record.name] = record
    return out


def diverged(key: str, seed: int) -> dict[str, Record]:
    name = f"{key}-s{seed}"
    return {name: Record(name=name, arm=key, title=key, group="", seed=seed, status="diverged")}


def status(claim: str, *records: dict[str, Record]) -> str:
    merged: dict[str, Record] = {}
    for some in records:
        merged |= some
    return judge(merged)[claim].status


def test_nothing_is_claimed_before_its_arms_have_run() -> None:
    assert {v.status for v in judge({}).values()} == {"not run yet"}
    found = judge(arm("A", 3) | arm("C", 4))["P1"]
    assert found.status == "not run yet" and found.missing == ("A (3 of 4)",)


STILL = {"M": 0.05, "S": 0.95}


@pytest.mark.parametrize(
    ("a", "c", "said"),
    [
        (STILL, {}, "reproduced"),
        ({"M": [0.05, 0.9, 0.05, 0.95], "S": [1, 0, 1, 0]}, {}, "inconclusive"),
        ({}, {}, "not reproduced"),
        ({"M": 0.5}, {}, "partly"),  # moves less, without standing still
        (STILL, STILL, "partly"),  # C stands still too
    ],
)
def test_p1(a: dict[str, Any], c: dict[str, Any], said: str) -> None:
    assert status("P1", arm("A", **a), arm("C", **c)) == said


def test_p1_by_share_of_static_videos() -> None:
    assert status("P1", arm("A", M=0.4, S=0.7), arm("C")) == "reproduced"
    assert status("P1", arm("A", M=0.4, S=0.1), arm("C")) == "partly"


@pytest.mark.parametrize(
    ("m", "drift", "signed", "said"),
    [
        (1.0, 0.4, 0.3, "reproduced"),
        (1.0, 0.21, 0.3, "partly"),  # hardly more drift
        (1.0, 0.4, [0.3, -0.3, 0.2, -0.2], "partly"),
        (1.0, [0.1, 0.6, 0.1, 0.6], 0.3, "inconclusive"),  # holds 1 and 1.25
        (0.1, 0.4, 0.3, "inconclusive"),  # stands still: its drift counts for nothing
        (1.0, 0.15, [0.1, -0.1, 0.1, -0.1], "not reproduced"),  # that it moves is not enough
    ],
)
def test_p2(m: float, drift: Any, signed: Any, said: str) -> None:
    b = arm("B", M=m, long={"drift_2s": drift, "signed_drift": signed})
    assert status("P2", b, arm("C")) == said


def test_p2_needs_the_adjusted_p_value() -> None:
    """An effect at p near 0.03 by itself is not enough among three primary claims."""
    b = arm("B", long={"drift_2s": [0.23, 0.35, 0.27, 0.36], "signed_drift": 0.3})
    c = arm("C", long={"drift_2s": [0.2, 0.2, 0.2, 0.2]})
    found = judge(b | c)["P2"]
    assert found.p is not None and 0.05 / 3 < found.p < 0.05
    assert all(found.conditions.values()) and found.status == "partly"


def test_p3() -> None:
    worse = {"FDtd": 8.0, "FDnss_late": 9.0}
    a, b, d = (arm(k, **worse) for k in "ABD")
    assert status("P3", a, b, arm("C"), d) == "reproduced"
    assert status("P3", a, b, arm("C", M=0.5), d) == "partly"
    assert status("P3", a, b, arm("C", FDnss_late=20.0), d) == "partly"
    steady = arm("D", **worse, long={"drift_2s": 0.1})
    assert status("P3", a, b, arm("C"), steady) == "partly"
    still = arm("D", **worse, M=0.1, long={"drift_2s": 0.01})  # drift of a still arm does not count
    assert status("P3", a, b, arm("C"), still) == "reproduced"
    all_bad = arm("C", M=0.5, FDtd=20.0, FDnss_late=20.0, long={"drift_2s": 1.0})
    assert status("P3", a, b, all_bad, d) == "not reproduced"


@pytest.mark.parametrize(
    ("distance", "said"),
    [
        (10.0, "reproduced"),
        (4.8, "not reproduced"),  # worse, but not by half
        (4.0, "not reproduced"),
        ([3.0, 12.0, 3.0, 12.0], "inconclusive"),
    ],
)
def test_p4(distance: Any, said: str) -> None:
    assert status("P4", arm("no_warmup", FDnss_late=distance), arm("C")) == said


def weights(**at: dict[str, Any]) -> dict[str, Record]:
    out: dict[str, Record] = {}
    for weight in (0, 5, 20, 50, 200):
        out |= arm(WEIGHTS[weight], 3, **at.get(f"w{weight}", {}))
    return out


def test_s1() -> None:
    bad, more = {"FDtd": 20.0, "FDnss_late": 20.0}, {"FDnss_late": 8.0}
    some = {"FDnss_late": 6.0}
    whole = weights(w0=bad, w5=some, w50=more, w200=bad)
    assert status("S1", whole) == "reproduced"
    # The best weight lies elsewhere inside.
    assert status("S1", weights(w0=bad, w20=more, w50={}, w5=more, w200=bad)) == "partly"
    # The more the better: no optimum inside, none of the rule met.
    falling = weights(w0={"FDtd": 3.9}, w5={"FDtd": 4.4}, w20={"FDtd": 4.3, "FDnss_late": 5.0},
                      w50={"FDnss_late": 4.0}, w200={"FDtd": 2.0})  # fmt: skip
    assert status("S1", falling) == "not reproduced"
    # Runs that diverge count as the paper's collapse.
    gone = whole | diverged("weight_0", 0) | diverged("weight_0", 1)
    assert status("S1", gone) == "reproduced"


def test_s1_with_a_weight_that_always_diverges() -> None:
    """Its missing FDtd must not become the best one, nor a score of nothing the best score."""
    bad = {"FDtd": 20.0, "FDnss_late": 20.0}
    whole = weights(w0=bad, w50={"FDnss_late": 8.0}, w200=bad)
    for seed in range(3):
        whole |= diverged("weight_5", seed)
    assert status("S1", whole) == "reproduced"
    gone: dict[str, Record] = {}
    for weight in (0, 5, 20, 50, 200):
        for seed in range(3):
            gone |= diverged(WEIGHTS[weight], seed)
    assert not judge(gone)["S1"].conditions["20 is within 10% of the best weight"]


def test_what_stands_still_counts_neither_for_drift_nor_for_consistency() -> None:
    b = arm(
        "B", M=[1.0, 1.0, 1.0, 0.1], long={"drift_2s": 0.4, "signed_drift": [0.3, 0.31, 0.3, 9]}
    )
    signed = judge(b | arm("C"))["P2"].effects["signed drift of B"]
    assert signed.seeds == (0, 1, 2) and signed.value < 0.4
    two = arm("stage2", M=1.2, consistency_subject=0.6, colors=0.5)
    half = arm("C", M=[0.1, 1.0, 1.0, 1.0])
    consistency = judge(two | half)["S2"].effects["consistency of III less that of II"]
    assert consistency.seeds == (1, 2, 3)
    assert status("S2", two, arm("C", **STILL)) == "partly"  # a still C is not the more consistent


def test_s2() -> None:
    two = arm("stage2", M=1.2, consistency_subject=0.6, colors=0.5)
    assert status("S2", two, arm("C")) == "reproduced"
    alike = arm("stage2", M=1.2, consistency_subject=0.6, colors=0.8)
    assert status("S2", alike, arm("C")) == "partly"  # the trade alone
    assert status("S2", arm("stage2", M=[0.8, 1.3, 0.8, 1.3]), arm("C")) == "inconclusive"
    assert status("S2", arm("stage2", M=0.7, consistency_subject=0.9), arm("C")) == "not reproduced"


def test_s3() -> None:
    assert status("S3", arm("C"), arm("four_steps", 3)) == "reproduced"
    better = arm("four_steps", 3, FDtd=2.0, FDnss_late=2.0)
    assert status("S3", arm("C"), better) == "not reproduced"
    wild = arm("four_steps", 3, FDtd=[2.0, 9.0, 4.0])
    assert status("S3", arm("C"), wild) == "inconclusive"


def test_s4() -> None:
    worse, better = {"FDtd": 8.0, "FDnss_late": 8.0}, {"FDtd": 2.0, "FDnss_late": 2.0}
    assert status("S4", arm("C"), arm("joint", 3, **worse)) == "reproduced"
    assert status("S4", arm("C"), arm("joint", 3, **better)) == "not reproduced"
    assert status("S4", arm("C"), arm("joint", 3)) == "inconclusive"
    assert status("S4", arm("C"), arm("joint", 3, FDtd=8.0)) == "inconclusive"


def test_every_claim_has_a_rule_that_runs_on_diverged_arms() -> None:
    records: dict[str, Record] = {}
    for claim in CLAIMS:
        for key in claim.arms:
            for seed in range(4):
                records |= diverged(key, seed)
    for verdict in judge(records).values():
        assert verdict.status != "reproduced"


def test_controls_that_misbehave_void_the_run() -> None:
    figures = {
        "real/short": {"M": 1.0, "FDtd": 0.3, "FDnss_late": 0.2},
        "static/short": {"M": 0.0, "S": 1.0, "FDtd": 400.0},
        "drift-contrast/short": {"FDnss_late": 30.0},
        "real/long": {"signed_drift": 0.01}, "drift-contrast/long": {"signed_drift": 0.8},
    }  # fmt: skip

    def record(**changes: Any) -> Record:
        return Record(
            name="controls-s0", arm="controls", title="", group="", seed=0, status="done",
            figures=figures | changes,
        )  # fmt: skip

    assert controls_problems(record()) == []
    moving = {"static/short": {"M": 0.5, "S": 1.0, "FDtd": 400.0}}
    assert controls_problems(record(**moving)) == ["held-still clips have M below 0.05"]
    assert len(controls_problems(record(**{"drift-contrast/short": {}}))) == 1
    assert controls_problems(None) == ["the controls were not measured yet"]
