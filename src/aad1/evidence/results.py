"""One small JSON per run: what was trained, its curves, its figures, and what went wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aad1.atomic import replace_file
from aad1.errors import UserError

FORMAT = "aad1.evidence.1"
DONE, DIVERGED, FAILED = "done", "diverged", "failed"
FINISHED = (DONE, DIVERGED)
"""A run that diverged is a result; one that failed for another reason is tried again."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run as docs/evidence/NAME.json holds it."""

    name: str
    arm: str
    title: str
    group: str
    seed: int
    status: str
    """"done", "diverged" (a loss was not finite) or "failed"."""
    error: str = ""
    settings_hash: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    updates: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    device: str = ""
    torch: str = ""
    commit: str = ""
    source_hash: str = ""
    """Of the package's Python files, for copies without a repository."""
    parent: str = ""
    start: str = ""
    """sha256 of the weights that it started from: the parent's, as they were at hand."""
    weights: str = ""
    """sha256 of the generator, as `Pipeline` counts it."""
    gate: str = ""
    """"passed", or why the run was made without that."""
    curves: Mapping[str, list[list[float]]] = field(default_factory=dict)
    """Name -> [[update, value], ...] on the monitor's clips; "train/..." of training logs."""
    figures: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Set of videos -> figure -> value, None where it could not be computed."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """"set/figure" -> why there is no value."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Seconds per chunk and the like."""
    samples: str = ""
    """File of the first samples, beside the JSON."""
    earlier: tuple[str, ...] = ()
    """Errors of attempts before this one."""

    def save(self, folder: Path) -> Path:
        """Writes NAME.json, whole or not at all."""
        path = folder / f"{self.name}.json"
        with replace_file(path) as temporary:
            content = {"format": FORMAT, **asdict(self)}
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return path

    def value(self, videos: str, figure: str) -> float | None:
        """A figure, None if it is not there."""
        return self.figures.get(videos, {}).get(figure)


def load(path: Path) -> Record:
    """Reads a result; UserError for a file that is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        content["earlier"] = tuple(content.get("earlier", ()))
        return Record(**content)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read a result from {path}: {error}") from None


def load_all(folders: Iterable[Path]) -> dict[str, Record]:
    """All results by name; of a name in several folders the last one counts."""
    found: dict[str, Record] = {}
    for folder in folders:
        for path in sorted(folder.glob("*-s*.json")):
            record = load(path)
            found[record.name] = record
    return found


def source_hash() -> str:
    """Of every Python file of the package."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def git_commit() -> str:
    """The commit of the checkout, with a plus where files differ; "" without a repository."""

    def git(*args: str) -> str:
        found = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
        )
        return found.stdout.strip() if found.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


say: Callable[[str], None] = lambda text: print(f"evidence: {text}", flush=True)  # noqa: E731
