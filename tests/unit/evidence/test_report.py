"""docs/evidence.md: what is committed is what the results give, and says what is missing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from aad1.evidence import gate
from aad1.evidence.claims import CLAIMS
from aad1.evidence.report import write
from aad1.evidence.results import Record

DOCS = Path(__file__).parents[3] / "docs"


def test_the_committed_page_is_what_the_results_give(tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    folder.mkdir()
    for path in (DOCS / "evidence").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    for made in write(folder, tmp_path / "evidence.md"):
        committed = DOCS / made.relative_to(tmp_path)
        assert committed.read_text() == made.read_text(), (
            f"{committed} is not up to date: run python runs/evidence_report.py"
        )
    shown = re.findall(r"\]\((evidence/[^)]+)\)", (DOCS / "evidence.md").read_text())
    assert all((DOCS / path).exists() for path in shown)


def planted(folder: Path) -> None:
    for number, arm in enumerate("ABCD"):
        for seed in range(4):
            value = 1 + 0.01 * seed
            still = arm == "A"
            distance = value * (4 if arm == "C" else 8 + number)
            Record(
                name=f"{arm}-s{seed}", arm=arm, title=arm, group="g", seed=seed, status="done",
                updates=10, train_seconds=60.0, device="test", settings_hash="0123456789",
                figures={
                    "short": {"M": 0.01 * value if still else value, "S": float(still),
                              "FDtd": distance, "FDnss_late": distance + seed},
                    "long": {"M": value, "drift_2s": value * (0.2 if arm == "C" else 0.5),
                             "drift_ratio_2s": value, "signed_drift": 0.3 * value},
                },
                curves={"M": [[1, 0.5], [2, value]], "heldout_gap": [[1, 0.1], [2, 0.4]]},
                samples=f"{arm}-s0.jpg" if seed == 0 else "",
            ).save(folder)  # fmt: skip


def test_planted_results_are_told_in_full(tmp_path: Path) -> None:
    folder, page = tmp_path / "evidence", tmp_path / "evidence.md"
    folder.mkdir()
    planted(folder)
    files = write(folder, page)
    text = page.read_text()
    assert "16 of " in text and "16 minutes with all trials, on test" in text
    assert (
        "| P1 | A causal, frame-wise discriminator lets motion collapse. | **reproduced**" in text
    )
    assert (
        "| P4 | Without the DMD warm-up, adversarial training is worse. | **not run yet**" in text
    )
    assert "Seeds still missing: no_warmup (0 of 4)." in text
    assert "| A, seed 3 | 0.010 |" in text
    assert "| **C** | 1.0" in text
    assert {f.name for f in files} == {
        "evidence.md",
        *(f"curves-{g}-{n}.svg" for g in ("discriminator", "warm-up", "weights", "steps")
          for n in ("M", "heldout_gap")),
    }  # fmt: skip
    assert "[A](evidence/A-s0.jpg)" in text
    # C is 20 among the regulariser's weights, and C elsewhere.
    weights, steps = ((folder / f"curves-{g}-M.svg").read_text() for g in ("weights", "steps"))
    assert ">20<" in weights and ">C<" not in weights and ">C<" in steps
    assert "**No verdict counts as long as the controls" in text
    good = {
        "real/short": {"M": 1.0, "FDtd": 0.3, "FDnss_late": 0.2},
        "static/short": {"M": 0.0, "S": 1.0, "FDtd": 400.0},
        "drift-contrast/short": {"FDnss_late": 30.0},
        "real/long": {"signed_drift": 0.01}, "drift-contrast/long": {"signed_drift": 0.8},
    }  # fmt: skip
    Record(
        name="controls-s0", arm="controls", title="", group="teacher", seed=0, status="done",
        figures=good,
    ).save(folder)  # fmt: skip
    write(folder, page)
    assert "No verdict counts" not in page.read_text()
    assert "They behave as they must." in page.read_text()
    # Without the results of C nothing of them stays, plots included.
    for path in folder.glob("C-*.json"):
        path.unlink()
    write(folder, page)
    assert "| **C** |" not in page.read_text()
    assert not (folder / "curves-steps-M.svg").exists()


def test_failures_and_trials_are_listed(tmp_path: Path) -> None:
    folder, page = tmp_path / "evidence", tmp_path / "evidence.md"
    folder.mkdir()
    record = Record(
        name="weight_0-s0", arm="weight_0", title="", group="weights", seed=0, status="diverged",
        error="update 3: the critic's loss is nan", gate="ignored: no time",
    )  # fmt: skip
    record.save(folder)
    replace(record, name="gate-C-low-s1000", arm="gate-C", seed=1000, status="done").save(folder)
    write(folder, page)
    text = page.read_text()
    assert "| weight_0-s0 | diverged: update 3: the critic's loss is nan; gate ignored" in text
    assert "| gate-C-low-s1000 | done" in text
    assert "## The gate" in text and "Not passed" not in text
    judged = {"passed": False, "settings": "ab12", "updates": 7, "warnings": ["a weak teacher"],
              "stage II, full method": {"FDtd": [3.0, 4.5]}}  # fmt: skip
    gate.write(judged, folder, "gate-ab12cd.json")
    write(folder, page)
    text = page.read_text()
    assert "Not run yet with the present settings." in text
    assert text.index("With earlier settings:") < text.index("Not passed, settings ab12")
    assert "Not passed, settings ab12, after 7 updates." in text
    assert "| FDtd | 3.00 | 4.50 |" in text and "- a weak teacher" in text
    assert "| weight_0, seed 0 | diverged |" in text


def test_arms_that_did_not_share_their_start_are_named(tmp_path: Path) -> None:
    folder, page = tmp_path / "evidence", tmp_path / "evidence.md"
    folder.mkdir()
    for name, start in (("A", "aa"), ("B", "bb"), ("C", "aa")):
        Record(name=f"{name}-s0", arm=name, title="", group="", seed=0, status="done",
               parent="stage2-s0", start=start).save(folder)  # fmt: skip
    write(folder, page)
    assert "stage2-s0 were made again, and not the same; A-s0, C-s0 from aa; B-s0 from bb." in (
        page.read_text()
    )
    (folder / "B-s0.json").unlink()
    write(folder, page)
    assert "exact partners" not in page.read_text()


@pytest.mark.parametrize("claim", [c.name for c in CLAIMS])
def test_an_empty_folder_says_not_run_yet(claim: str, tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    folder.mkdir()
    write(folder, tmp_path / "evidence.md")
    text = (tmp_path / "evidence.md").read_text()
    section = text.split(f"## {claim}: ")[1].split("\n## ")[0]
    assert "not run yet" in section and not re.search(r"\d\.\d\d", section)
