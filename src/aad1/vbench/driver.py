"""Score a video set: one process per dimension, each result checked, kept, and not made twice.

out/results/{dimension}.json, drift.json    what was computed, and with what
out/logs/                                   what VBench printed
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aad1.errors import UserError
from aad1.vbench.drift import cut_pieces, piece_name
from aad1.vbench.environment import Environment, JobFailed, code_version
from aad1.vbench.protocol import INFO, Pair, video_names
from aad1.vbench.results import BadResult, Result, load_result, read_vbench, save_result
from aad1.vbench.videos import check_videos

DRIFT = "drift"


@dataclass(frozen=True)
class Driver:
    """Computes results into `out`. say: told one line per dimension."""

    environment: Environment
    out: Path
    say: Callable[[str], None] = print

    def score_set(
        self, pairs: Sequence[Pair], dimensions: Sequence[str], videos: Path, seeds: int
    ) -> dict[str, str]:
        """Score the standard set; returns the dimensions that failed, each with the reason.

        A dimension that fails, or gives NaN or too few values, leaves no result and stops no
        other. One whose result was made with the same videos, code and images is not run again.
        """
        made_with = self._made_with(videos, video_names(pairs, seeds))
        failed = {}
        for dimension in dimensions:
            names = video_names(pairs, seeds, dimension)
            job = {"do": "set", "dimension": dimension, "ratio": self.environment.places.ratio}
            reason = self._score(dimension, dimension, job, videos, names, made_with)
            if reason:
                failed[dimension] = reason
        return failed

    def score_drift(self, videos: Path) -> dict[str, str]:
        """Imaging quality of all pieces of 1 s of the long videos; returns {} or the reason."""
        names = sorted(entry.name for entry in videos.glob("*.mp4"))
        if not names:
            raise UserError(f"{videos} holds no mp4 file; make the drift set first")
        problems, shape = check_videos(videos, names)
        if problems or shape is None:
            raise UserError(f"the drift set is not complete: {problems[0]}")
        made_with = self._made_with(videos, names)
        kept = load_result(self._result(DRIFT))
        if kept is not None and kept.made_with == made_with:
            self.say(f"{DRIFT}: kept")
            return {}
        pieces = self.out / "drift-pieces"
        shutil.rmtree(pieces, ignore_errors=True)
        try:
            wanted = []
            for number, name in enumerate(names):
                count = cut_pieces(videos / name, pieces, f"{number:04}", round(shape.fps))
                wanted += [piece_name(f"{number:04}", piece) for piece in range(count)]
            job = {"do": "any", "dimension": "imaging_quality"}
            reason = self._score(DRIFT, "imaging_quality", job, pieces, wanted, made_with)
        finally:
            shutil.rmtree(pieces, ignore_errors=True)
        return {DRIFT: reason} if reason else {}

    def _score(
        self,
        what: str,
        dimension: str,
        job: dict[str, Any],
        videos: Path,
        names: Sequence[str],
        made_with: dict[str, Any],
    ) -> str:
        """Run one job unless its result is there; "" or the reason why it failed."""
        path = self._result(what)
        kept = load_result(path)
        if kept is not None and kept.made_with == made_with:
            self.say(f"{what}: kept, {100 * kept.score:.2f}")
            return ""
        path.unlink(missing_ok=True)  # of other videos or other code
        folder = self.environment.scratch / "vbench" / what
        shutil.rmtree(folder, ignore_errors=True)  # else an old file could pass for a new one
        folder.mkdir(parents=True)
        places = self.environment.places
        paths = {"folder": str(folder), "videos": str(videos), "info": str(places.root / INFO)}
        try:
            told = self.environment.run({**job, **paths}, what)
            score, values = read_vbench(folder / f"{dimension}_eval_results.json", dimension, names)
        except (JobFailed, BadResult) as error:
            self.say(f"{what}: not computed, {error}")
            return str(error)
        save_result(path, Result(score, values, made_with, told["versions"]))
        self.say(f"{DRIFT}: scored" if what == DRIFT else f"{what}: {100 * score:.2f}")
        return ""

    def _result(self, what: str) -> Path:
        return self.out / "results" / f"{what}.json"

    def _made_with(self, videos: Path, names: Sequence[str]) -> dict[str, Any]:
        """What a score depends on; the files by name, size and time, since hashing takes long."""
        digest = hashlib.sha256()
        for name in sorted(names):
            stat = (videos / name).stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return {
            "videos": digest.hexdigest(),
            "ratio": self.environment.places.ratio,
            **code_version(self.environment.places.root),
        }


def drift_pieces(result: Result) -> dict[str, list[float]]:
    """Imaging quality of each long video's pieces, in order, from the driver's drift result."""
    found: dict[str, dict[int, float]] = {}
    for name, value in result.videos.items():
        stem, piece = Path(name).stem.rsplit("-", 1)
        found.setdefault(stem, {})[int(piece)] = value
    return {stem: [values[k] for k in sorted(values)] for stem, values in found.items()}
