"""Which metric must catch which corruption, and which must stay silent."""

from __future__ import annotations

import pytest
import torch

from aad1.errors import UserError
from aad1.evaluate.corruptions import CORRUPTIONS
from aad1.evaluation.validate import COLUMNS, Table, as_json, as_markdown, corruption_table
from aad1.worlds.sprites import SpritesConfig, draw

CONFIG = SpritesConfig(size=32, frames=25)

SUBJECT, BACKGROUND, FIRST, LAST = COLUMNS[-4:]
CAUGHT: dict[str, set[str]] = {
    "static": {"M", "late_M", "S", "W1_flow", "FDtd", "FD_motion", *COLUMNS[-4:]},
    "freeze@8": {"M", "late_M", "W1_flow", "FDtd"},
    "doubled": {"M", "late_M", "FDtd"},
    "ping-pong": {"FDtd"},
    "blur": {"niqe", "sharpness", "FDtd", "FDnss_early", "FDnss_late", FIRST},
    "drift-blur": {"niqe", "drift_2s", "drift_1s", "signed_drift", "FDtd", "FDnss_late"},
    "drift-contrast": {"FDtd", "FDnss_late", "color_shift"},
    "drift-noise": {"niqe", "drift_2s", "signed_drift", "smoothness", "FDtd", "FDnss_late"},
    "flicker": {"smoothness", "flicker", "FDtd", FIRST},
    "swap order": {"smoothness", "flicker", "FDtd"},
    "swap identity": {"flicker", "color_shift", "FDtd", *COLUMNS[-4:]},
}
SILENT: dict[str, set[str]] = {  # the blind spots, which is why no single figure is enough
    "real": set(COLUMNS),
    "static": {"niqe", "FDnss_early", "FDnss_late", "signed_drift"},
    "freeze@8": {"niqe", "FDnss_early", "FDnss_late", "signed_drift"},
    "doubled": {"niqe", "FDnss_early", "FDnss_late", "signed_drift"},
    "ping-pong": {"M", "late_M", "S", "W1_flow", "FDnss_late"},
    "blur": {"M", "late_M", "S", "W1_flow", "flicker", "signed_drift", "FD_motion", SUBJECT},
    "drift-blur": {"M", "late_M", "S", "W1_flow", "flicker", "FD_motion", SUBJECT, LAST},
    "drift-contrast": {"M", "late_M", "S", "W1_flow", "FD_motion", FIRST},
    "drift-noise": {"M", "S", "FD_motion", SUBJECT, BACKGROUND, LAST},
    "flicker": {
        "FD_motion",
        LAST,
        "S",
        "niqe",
        "sharpness",
        "drift_2s",
        "FDnss_early",
        "FDnss_late",
    },
    "swap order": {
        "FD_motion",
        SUBJECT,
        BACKGROUND,
        LAST,
        "S",
        "niqe",
        "sharpness",
        "drift_2s",
        "FDnss_early",
        "FDnss_late",
    },
    "swap identity": {"FD_motion", "S", "niqe", "sharpness", "FDnss_early", "FDnss_late"},
}


@pytest.fixture(scope="module")
def table() -> Table:
    return corruption_table(32, CONFIG)


@pytest.mark.parametrize("name", SILENT)
def test_corruptions_are_caught_and_blind_spots_stay_blind(name: str, table: Table) -> None:
    fired = {metric for metric, cell in table.rows[name].items() if cell.fires}
    assert fired >= CAUGHT.get(name, set())
    assert not fired & SILENT[name]


def test_standing_still_raises_consistency_and_another_video_lowers_it(table: Table) -> None:
    """Why consistency is never shown without M."""
    for name in COLUMNS[-4:]:
        assert table.rows["static"][name].deviation > 4
        assert table.rows["static"][name].value == pytest.approx(1, abs=1e-3)
        assert table.rows["swap identity"][name].deviation < -4


def test_four_figures_cover_all_eleven(table: Table) -> None:
    """M, FDtd, late FDnss and drift: each corruption is seen, and real clips are not."""
    few = ("M", "FDtd", "FDnss_late", "drift_2s")
    for name in CORRUPTIONS:
        assert any(table.rows[name][metric].fires for metric in few), name
    assert not any(table.rows["real"][metric].fires for metric in few)


def test_a_metric_that_sees_nothing_would_fail_the_table(table: Table) -> None:
    """Planted bug: real clips in place of the corrupted ones satisfy no list of CAUGHT."""
    fired = {metric for metric, cell in table.rows["real"].items() if cell.fires}
    assert all(not fired >= caught for caught in CAUGHT.values())


def test_the_table_is_written_in_full(table: Table) -> None:
    text = as_markdown(table)
    lines = text.splitlines()
    assert sum(line.startswith(f"| {metric} |") for metric in COLUMNS for line in lines) == len(
        COLUMNS
    )
    rows = as_json(table)["rows"]
    assert set(rows) == {"real", *CORRUPTIONS}
    assert rows["blur"]["drift_5s"] == {"value": None, "deviation": None, "fires": False}


def test_corruptions_keep_shape_and_source() -> None:
    video = draw(CONFIG, 3, seed=0)[0].video
    before = video.clone()
    for name, spoil in CORRUPTIONS.items():
        spoilt = spoil(video)
        assert spoilt.shape == video.shape and spoilt.dtype == torch.uint8, name
        assert not torch.equal(spoilt, video), name
        if name not in ("blur", "drift-blur"):
            assert torch.equal(spoilt[:, 0], video[:, 0]), name
    assert torch.equal(video, before)


def test_too_few_clips() -> None:
    with pytest.raises(UserError, match="at least 16"):
        corruption_table(8, CONFIG)
