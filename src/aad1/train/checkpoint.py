"""Checkpoints of a run: complete or not there, and readable by any number of processes.

A checkpoint is a folder `step-NNNNNN`, or `step-NNNNNN-TT` in the middle of an update (TT steps of
it are done). Every process writes its shards with torch's distributed checkpoints into a folder of
another name; `meta.json`, which lists the files with their sizes, comes last, and then the name.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from aad1.atomic import publish_folder
from aad1.errors import UserError
from aad1.models.weights import read_json, write_json
from aad1.parallel.mesh import Processes, SharedError

_dcp: Any = dcp  # it does not say what it exports
META, WEIGHTS = "meta.json", "weights"
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")


def step_folder(run: Path, update: int, turn: int = 0) -> Path:
    name = f"step-{update:06d}" + (f"-{turn:02d}" if turn else "")
    return run / "checkpoints" / name


def save(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    processes: Processes | None = None,
    keep: int = 1,
) -> None:
    """Write a checkpoint under a temporary name, rename it, and drop all but the newest `keep`.

    tensors: the same names in all processes; sharded ones are written by all, others once. meta:
    plain data. A failed write (a full disk) is a UserError in all processes, and what was there
    before stays.
    """
    processes = processes or Processes()
    alone = processes.size == 1
    temporary, old = (folder.parent / f".{folder.name}.{kind}" for kind in ("new", "old"))
    problem = None
    if processes.main:
        try:
            for rest in (temporary, old):
                shutil.rmtree(rest, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
    if not processes.any(problem is not None):  # nobody writes before the folder is there
        try:
            with _quiet():
                _dcp.save(dict(tensors), checkpoint_id=temporary / WEIGHTS, no_dist=alone)
        except (CheckpointException, OSError, RuntimeError) as error:
            free = shutil.disk_usage(folder.parent).free / 2**30
            problem = f"{_cause(error)} ({free:.2f} GiB free on the disk)"
        if processes.main and problem is None:
            try:
                write_json(temporary / META, {**meta, "files": _sizes(temporary)})
                publish_folder(temporary, folder, aside=old)
            except OSError as error:
                problem = str(error)
    problems = [p for p in processes.gather(problem) if p]
    if processes.main:
        for rest in (temporary, old):
            shutil.rmtree(rest, ignore_errors=True)
        if not problems:
            for before in steps(folder.parent.parent)[: -keep or None]:
                shutil.rmtree(before, ignore_errors=True)
    if problems:
        kept = steps(folder.parent.parent)
        older = f"{kept[-1]} is kept" if kept else "there is none before it"
        raise SharedError(f"{folder} could not be written: {problems[0]}; {older}")


def steps(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = []
    for path in (run / "checkpoints").glob("step-*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / META).exists():
            found.append((int(match[1]), int(match[2] or 0), path))
    return [path for *_, path in sorted(found)]


def read_meta(folder: Path) -> dict[str, Any]:
    """What was saved as `meta`; UserError names a file that is missing or truncated."""
    meta = read_json(folder / META)
    if "files" not in meta:
        raise UserError(f"{folder} is a checkpoint of an older version; remove it to start anew")
    for name, size in meta.pop("files").items():
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} is missing; remove {folder} to go on from an older checkpoint")
        if path.stat().st_size != size:
            raise UserError(f"{path} is truncated: {path.stat().st_size} bytes of {size}")
    return meta


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a checkpoint, by name."""
    stored = _dcp.FileSystemReader(folder / WEIGHTS).read_metadata().state_dict_metadata
    return {
        name: tuple(entry.size)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load(
    folder: Path, tensors: Mapping[str, torch.Tensor], processes: Processes | None = None
) -> None:
    """Fill tensors in place, however they are sharded; UserError names what does not fit."""
    processes = processes or Processes()
    stored = shapes(folder)
    for name, tensor in tensors.items():
        if stored.get(name) != tuple(tensor.shape):
            raise UserError(
                f"{folder} does not fit: {name} is {stored.get(name, 'missing')} there, "
                f"{tuple(tensor.shape)} here"
            )
    try:
        with _quiet():
            _dcp.load(dict(tensors), checkpoint_id=folder / WEIGHTS, no_dist=processes.size == 1)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be read: {_cause(error)}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process saves by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.stat().st_size for p in files}


def _cause(error: BaseException) -> str:
    """One line of what went wrong, in whichever process."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
