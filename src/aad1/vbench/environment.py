"""Processes in VBench's environment: its Python, its checkout as working folder, no downloads."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aad1.errors import UserError
from aad1.vbench.protocol import Places

RUNNER = Path(__file__).with_name("runner.py")
DOWNLOADERS = ("wget", "git")  # what VBench calls for a weight or code that it does not find
_REFUSE = """#!/bin/sh
echo "refused by aad1: VBench tried to download: $(basename "$0") $*" >&2
exit 1
"""


@dataclass(frozen=True)
class Environment:
    """Where VBench runs. scratch: a folder of ours for jobs, logs and the failing downloaders."""

    places: Places
    python: Path
    device: str
    scratch: Path

    def run(self, job: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Run one job of runner.py in a process of its own and return what it reports.

        Its output goes to {scratch}/logs/{name}.log. Raises `JobFailed` if it ends with an error.
        """
        folder = self.scratch / "jobs"
        log = self.scratch / "logs" / f"{name}.log"
        folder.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        out = folder / f"{name}.out.json"
        out.unlink(missing_ok=True)
        told = folder / f"{name}.json"
        told.write_text(json.dumps({**job, "device": self.device, "out": str(out)}))
        command = [str(self.python), "-c", RUNNER.read_text(encoding="utf-8"), str(told)]
        with log.open("w", encoding="utf-8") as stream:
            try:
                code = subprocess.run(
                    command, cwd=self.places.root, env=self._variables(), stdin=subprocess.DEVNULL,
                    stdout=stream, stderr=subprocess.STDOUT, check=False,
                ).returncode  # fmt: skip
            except OSError as error:
                raise UserError(f"--python {self.python} cannot be run: {error.strerror}") from None
        if code != 0 or not out.is_file():
            raise JobFailed(f"{_exit(code)}: {_last_line(log)} (log: {log})")
        return dict(json.loads(out.read_text(encoding="utf-8")))

    def _variables(self) -> dict[str, str]:
        """The caller's variables, less our import path, with VBench's folders and no downloads."""
        refuse = self.scratch / "no-downloads"
        refuse.mkdir(parents=True, exist_ok=True)
        for name in DOWNLOADERS:
            (refuse / name).write_text(_REFUSE)
            (refuse / name).chmod(0o755)
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return ours | {
            "PATH": f"{refuse}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(self.places.root),
            "VBENCH_CACHE_DIR": str(self.places.cache),
            "TORCH_HOME": str(self.places.hub.parent),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",  # the log's last line is then the error, not a late print
        }


class JobFailed(Exception):
    """A process in VBench's environment ended with an error; the message says which."""


def _exit(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}" if code else "no result"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")


def code_version(root: Path) -> dict[str, str]:
    """The checkout's commit ("unknown" if it is no git checkout) and a hash of its Python files."""
    digest = hashlib.sha256()
    for package in ("vbench", "vbench2_beta_i2v"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    found = {"git_sha": _git(root, "rev-parse", "HEAD") or "unknown"}
    # A folder inside another repository would give that repository's commit.
    if _git(root, "rev-parse", "--show-prefix"):
        found["git_sha"] = "unknown"
    elif _git(root, "status", "--porcelain", "--untracked-files=no"):
        found["git_sha"] += " (changed)"
    return {**found, "python_files_sha256": digest.hexdigest()}


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
