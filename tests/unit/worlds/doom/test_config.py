"""What may be recorded, and that a manifest keeps it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aad1.errors import UserError
from aad1.worlds.doom import CAPTIONS, WORDS, DoomConfig, config_from_dict


def test_vocabulary() -> None:
    assert len(set(CAPTIONS)) == len(CAPTIONS) == 9
    assert {word for caption in CAPTIONS for word in caption.split()} == set(WORDS)


def test_default_splits_share_no_map() -> None:
    config = DoomConfig()
    assert not set(config.maps("train")) & set(config.maps("heldout"))
    assert config.chunks == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 100}, "100x96"),
        ({"frames": 80}, "frames 80"),
        ({"frames": 1}, "frames 1"),
        ({"tics_per_frame": 0}, "tics_per_frame 0"),
        ({"switch_share": 1.5}, "switch_share 1.5"),
        ({"walk_speed": (0.9, 0.5)}, "walk_speed"),
        ({"turn_speed": (0.0, 4.0)}, "turn_speed"),
        ({"gamma": 9.0}, "gamma 9"),
        ({"clips_per_shard": 0}, "clips_per_shard"),
        ({"maps_train": ("MAP33",)}, "MAP33"),
        ({"maps_train": ("map01",)}, "map01"),
        ({"maps_train": ()}, "must each name"),
        ({"maps_train": ("MAP07",)}, "both for training and held out"),
    ],
)
def test_impossible_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DoomConfig(**change)


def test_config_survives_the_manifest() -> None:
    config = replace(DoomConfig(), gamma=2.0, walk_speed=(0.5, 0.6))
    assert config_from_dict(config.as_dict()) == config
