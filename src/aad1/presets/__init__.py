"""Every named experiment, as functions that return frozen configs."""

from __future__ import annotations

import difflib
from functools import lru_cache

from aad1.errors import UserError
from aad1.presets import doom, evidence, sprites, wan
from aad1.train.config import Experiment


@lru_cache(maxsize=1)
def presets() -> dict[str, Experiment]:
    """All presets by name: <world>-<stage>[-<ablation>]."""
    worlds = (sprites, evidence, doom, wan)
    return {name: e for world in worlds for name, e in world.experiments().items()}


def preset(name: str) -> Experiment:
    """One preset; UserError suggests the nearest name."""
    if name in presets():
        return presets()[name]
    near = difflib.get_close_matches(name, presets(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"no preset {name!r}{hint}; `aad1 train --show` shows all")
