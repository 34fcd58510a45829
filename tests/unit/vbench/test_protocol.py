"""The set that VBench asks for, read from its own JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aad1.errors import UserError
from aad1.vbench.merge import paper_table
from aad1.vbench.protocol import (
    DIMENSIONS,
    INFO,
    choose_dimensions,
    departures,
    read_pairs,
    video_names,
)
from vbench_standin import build


def test_pairs_are_those_of_the_eight_dimensions_with_vbench_names(tmp_path: Path) -> None:
    pairs = read_pairs(build(tmp_path / "VBench").root)
    assert [p.prompt for p in pairs] == ["a dog runs", "a lake, with fog", "A cat sleeps."]
    assert len(video_names(pairs)) == 15
    assert video_names(pairs, dimension="i2v_background") == [
        f"a lake, with fog-{k}.mp4" for k in range(5)
    ]
    assert "A cat sleeps.-4.mp4" in video_names(pairs, dimension="dynamic_degree")


def test_the_published_counts_make_1775_videos(tmp_path: Path) -> None:
    """246 subject prompts and 109 background ones: 355, times 5."""
    subject = [n for n, d in DIMENSIONS.items() if d.prompts in (246, 355)]
    background = [n for n, d in DIMENSIONS.items() if d.prompts in (109, 355)]
    entries = [
        {"prompt_en": f"{kind} {k}", "dimension": dimensions, "image_name": "x.jpg"}
        for kind, dimensions, count in (("s", subject, 246), ("b", background, 109))
        for k in range(count)
    ]
    entries += [{"prompt_en": "s 0, camera static", "dimension": ["camera_motion"]}] * 763
    write(tmp_path, entries)
    pairs = read_pairs(tmp_path)
    assert len(video_names(pairs)) == 1775
    assert departures(pairs, 5) == []
    assert departures(pairs, 4) == ["4 videos a prompt, published 5"]
    assert departures(pairs[1:], 5)[0] == "subject_consistency: 245 prompts, published 246"


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([], "no prompt of any"),
        ([{"prompt_en": "a", "dimension": ["i2v_subject"]}], "lacks 'image_name'"),
        (
            [
                {"prompt_en": "a", "dimension": ["i2v_subject"], "image_name": name}
                for name in ("1.jpg", "2.jpg")
            ],
            "'a' cannot name one video",
        ),
        (
            [{"prompt_en": "a/b", "dimension": ["i2v_subject"], "image_name": "1.jpg"}],
            "'a/b' cannot name one video",
        ),
    ],
)
def test_a_json_of_another_form_is_refused(
    tmp_path: Path, entries: list[object], says: str
) -> None:
    write(tmp_path, entries)
    with pytest.raises(UserError, match=says):
        read_pairs(tmp_path)


def test_no_checkout_and_unknown_dimensions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a git checkout of VBench"):
        read_pairs(tmp_path)
    with pytest.raises(UserError, match="'camera_motion' must be one of subject_consistency"):
        choose_dimensions(["camera_motion"])
    assert choose_dimensions(["i2v_subject", "dynamic_degree"]) == ["dynamic_degree", "i2v_subject"]


def test_the_paper_s_table_has_a_number_for_each_of_the_eight() -> None:
    paper = paper_table()
    assert paper["dimensions"] == list(DIMENSIONS)
    assert all(len(row["scores"]) == 8 for row in paper["rows"])
    rows = {row["name"]: dict(zip(DIMENSIONS, row["scores"], strict=True)) for row in paper["rows"]}
    assert rows["AAD-1 after stage III"]["dynamic_degree"] == 41.46
    assert rows["AAD-1, 720p"]["i2v_background"] == 98.70
    # The ablation without motion has no drift score, rather than a perfect one.
    assert paper["drift_rows"][0]["drift"] is None


def write(root: Path, entries: list[object]) -> None:
    (root / INFO).parent.mkdir()
    (root / INFO).write_text(json.dumps(entries))
