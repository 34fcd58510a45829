"""config.yaml: every preset survives the round trip, and mistakes in it are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from aad1.errors import UserError
from aad1.presets import preset, presets
from aad1.train.record import read_record, to_plain, write_record


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_survives_yaml(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_record(preset(name), path)
    assert read_record(path) == preset(name)


def change(where: str, value: Any, name: str = "sprites-tiny-dmd") -> Any:
    plain = to_plain(preset(name))
    *outer, last = where.split(".")
    inner = plain
    for part in outer:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return plain


@pytest.mark.parametrize(
    "where,value,message",
    [
        ("colour", 1, "config.yaml has no field 'colour'; it has name, stage"),
        ("optim.momentum", 1, "config.yaml.optim has no field 'momentum'; it has updates"),
        ("stage.type", "Magic", "config.yaml.stage.type must be one of PretrainConfig, .*'Magic'"),
        ("stage.type", ..., "config.yaml.stage.type must be one of .*None"),
        ("stage.penalty_weight", 1.0, "config.yaml.stage has no field 'penalty_weight'"),
        ("optim.updates", "many", "config.yaml.optim.updates must be int, got 'many'"),
        ("optim.batch", 0, "optim.batch must be at least 1, got 0"),
        ("optim.lr", "fast", "config.yaml.optim.lr must be float, got 'fast'"),
        ("optim.betas", [0.9], r"config.yaml.optim.betas must be a list of 2, got \[0.9\]"),
        ("sigmas", 1.0, "config.yaml.sigmas must be a list, got 1.0"),
        ("sigmas", ["x"], "config.yaml.sigmas must be float, got 'x'"),
        ("geometry", None, "config.yaml.geometry must be a mapping, got None"),
        ("geometry.window", 2, "window must be at least"),
        ("geometry.single_pass", True, "config.yaml.geometry.single_pass must be false, got True"),
        ("out", 3, "config.yaml.out must be a path, got 3"),
        ("init", 3, "config.yaml.init must be a path, got 3"),
        ("name", ..., "config.yaml needs the field 'name'"),
    ],
)
def test_mistakes_are_named_in_one_line(
    where: str, value: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(change(where, value)))
    with pytest.raises(UserError, match=message) as error:
        read_record(path)
    assert "\n" not in str(error.value)


def test_left_out_fields_take_their_default(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(change("optim.clip", ...)))
    assert read_record(path) == preset("sprites-tiny-dmd")


def test_a_single_pass_that_is_off_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(change("geometry.single_pass", False)))
    assert read_record(path) == preset("sprites-tiny-dmd")


def test_whole_numbers_may_stand_for_floats_but_not_the_other_way(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(change("optim.clip", 1)))
    value = read_record(path).optim.clip
    assert value == 1.0 and isinstance(value, float)
    path.write_text(yaml.safe_dump(change("optim.updates", 1.5)))
    with pytest.raises(UserError, match="must be int, got 1.5"):
        read_record(path)


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "\x00", "just words"])
def test_files_that_are_no_config_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="config.yaml") as error:
        read_record(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="none.yaml"):
        read_record(tmp_path / "none.yaml")
