"""Checkpoints of a run: complete or not there, and tied to their parent."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aad1.atomic import replace_folder
from aad1.errors import UserError
from aad1.models.weights import read_json, write_json

META, STATE = "meta.json", "state.pt"


def step_folder(run: Path, update: int) -> Path:
    return run / "checkpoints" / f"step-{update:06d}"


def save(run: Path, update: int, state: Mapping[str, Any], meta: Mapping[str, Any],
         keep: int = 1) -> Path:  # fmt: skip
    """Write checkpoints/step-N whole (temporary name, then renamed) and drop older ones."""
    folder = step_folder(run, update)
    with replace_folder(folder) as temporary:
        torch.save(dict(state), temporary / STATE)
        write_json(temporary / META, {"update": update, **meta})
    for old in steps(run)[: -keep or None]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def steps(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [
        p
        for p in (run / "checkpoints").glob("step-*")
        if re.fullmatch(r"step-\d+", p.name) and (p / META).exists() and (p / STATE).exists()
    ]
    return sorted(found)


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, meta) of one checkpoint; UserError if it is truncated or not ours."""
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder / STATE} is truncated or not a checkpoint: {line}") from None
    return state, read_json(folder / META)
