"""Results of single dimensions: read from VBench's JSON strictly, kept in files of our own."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aad1.atomic import replace_file
from aad1.errors import UserError


class BadResult(Exception):
    """VBench wrote a result that cannot be trusted; the message says why."""


@dataclass(frozen=True)
class Result:
    """One dimension's score.

    score: VBench's aggregate, in [0, 1].
    videos: video name -> its own value, in VBench's own unit (imaging quality 0..100).
    made_with: what the score depends on; a result made with other things is computed again.
    versions: of the packages in VBench's environment.
    """

    score: float
    videos: Mapping[str, float]
    made_with: Mapping[str, Any]
    versions: Mapping[str, str]


def read_vbench(
    path: Path, dimension: str, names: Collection[str]
) -> tuple[float, dict[str, float]]:
    """(aggregate, value of each video) from `{name}_eval_results.json`.

    Raises `BadResult` unless the aggregate is a number in [0, 1] and there is exactly one finite
    value for each of `names`.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        score, rows = found[dimension][:2]
        # A row holds video_path and video_results: a float, or a bool for dynamic degree.
        pairs = [(Path(row["video_path"]).name, float(row["video_results"])) for row in rows]
        score = float(score)
    except OSError:
        raise BadResult(f"VBench wrote no {path.name}") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BadResult(f"{path} is not of VBench's form: {error!r}") from None
    videos = dict(pairs)
    missing, strange = set(names) - videos.keys(), videos.keys() - set(names)
    if missing or strange or len(pairs) != len(videos):
        example = min(missing or strange or videos)
        raise BadResult(
            f"VBench scored {len(pairs)} videos, {len(names)} were asked for "
            f"({len(missing)} not scored, {len(strange)} unknown; for example {example!r})"
        )
    wrong = [name for name, value in videos.items() if not math.isfinite(value)]
    if wrong:
        raise BadResult(f"{len(wrong)} of {len(videos)} videos scored NaN, such as {wrong[0]!r}")
    if not 0 <= score <= 1:  # NaN too
        raise BadResult(f"the score is {score}, not in [0, 1] as VBench at 45e79ec gives it")
    return score, videos


def save_result(path: Path, result: Result) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")


def load_result(path: Path) -> Result | None:
    """The kept result, or None if there is none; UserError if the file is damaged."""
    if not path.is_file():
        return None
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; remove it to compute it again") from None
