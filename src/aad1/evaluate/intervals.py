"""Intervals within one model: bootstrap over prompts, Wilson for shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000


def bootstrap(
    statistic: Callable[[list[int]], float],
    keys: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    centered: bool = False,
    seed: int = 0,
) -> tuple[float, float] | None:
    """A 95% percentile interval; whole prompts are drawn, since their samples belong together.

    statistic: of the videos of these numbers, which may repeat.
    keys: of each video, the prompt it belongs to.
    centered: moves the interval so that its mean is the statistic of the videos themselves. A
        Frechet distance grows when videos repeat, so without it the interval lies too high.
    Returns None for fewer than three prompts, whose spread tells nothing.
    """
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    members = list(groups.values())
    if len(members) < 3:
        return None
    draws = np.random.default_rng(seed).integers(len(members), size=(resamples, len(members)))
    values = np.array([statistic([i for g in draw for i in members[g]]) for draw in draws])
    values = values[np.isfinite(values)]
    if len(values) < resamples // 2:
        return None
    low, high = (float(v) for v in np.percentile(values, [2.5, 97.5]))
    if centered:
        shift = statistic(list(range(len(keys)))) - float(values.mean())
        low, high = max(low + shift, 0.0), high + shift
    return low, high


def wilson(hits: int, number: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a share; (0, 1) if nothing was counted."""
    if number == 0:
        return 0.0, 1.0
    share = hits / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    reach = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    reach /= 1 + z * z / number
    return max(0.0, middle - reach), min(1.0, middle + reach)
