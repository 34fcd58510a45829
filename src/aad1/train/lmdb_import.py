"""Import of teacher trajectories in Self-Forcing's LMDB format.

What is taken for granted about a file (public code of Self-Forcing and its relatives):

- `latents_shape` and `prompts_shape` are text, numbers separated by spaces; that of the latents is
  N, n + 1, F, C, h, w (21, 16, 60, 104 for Wan at 832x480), frames before channels;
- `latents_{i}_data` is the raw float16 of one trajectory [n + 1, F, C, h, w] in C order, from noise
  to the clean clip: n states at evenly spaced steps of the teacher's grid, then the end point;
- `prompts_{i}_data` is the prompt in UTF-8;
- a folder is one database (`data.mdb`) or holds several such folders, read in name order.

The noise levels are not in the file. State j of n lies at shift(1 - j / n; k), with k the shift
that the trajectories were sampled with: 5 in Causal-Forcing, 8 in Self-Forcing's own script.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aad1.core.flow import sigma_grid
from aad1.data.shards import read_header, shard_name, write_shard
from aad1.errors import UserError
from aad1.train.trajectories import begin, finish


class OdeLmdb:
    """The trajectories of one folder, read one at a time.

    count: how many; levels: n; clip: (F, C, h, w). UserError if it is not such a database.
    """

    def __init__(self, folder: Path) -> None:
        self.folders = _databases(folder)
        self._counts: list[int] = []
        shapes = set()
        for database in self.folders:
            with _open(database) as read:
                shape = _shape(read("latents_shape"), database)
            self._counts.append(shape[0])
            shapes.add(shape[1:])
        if len(shapes) > 1:
            raise UserError(f"{folder} holds trajectories of different shapes: {sorted(shapes)}")
        states, *clip = shapes.pop()
        self.levels, self.clip = states - 1, tuple(clip)
        self.count = sum(self._counts)

    def sigmas(self, shift: float) -> list[float]:
        """Noise levels of the stored states, the end point left out."""
        return sigma_grid(self.levels, shift)[:-1].tolist()

    def read(self, numbers: range) -> Iterator[tuple[np.ndarray[Any, Any], str]]:
        """(states float16 [n + 1, C, F, h, w], prompt) of these numbers; one database is open."""
        start = 0
        for database, count in zip(self.folders, self._counts, strict=True):
            inside = [i - start for i in numbers if start <= i < start + count]
            start += count
            if not inside:
                continue
            with _open(database) as read:
                for i in inside:
                    raw = read(f"latents_{i}_data")
                    wanted = 2 * (self.levels + 1) * math.prod(self.clip)
                    if len(raw) != wanted:
                        raise UserError(
                            f"{database}: latents_{i}_data has {len(raw)} bytes, {wanted} fit "
                            f"{self.levels + 1} states of {list(self.clip)} in float16"
                        )
                    states = np.frombuffer(raw, np.float16).reshape(self.levels + 1, *self.clip)
                    prompt = read(f"prompts_{i}_data").decode("utf-8")
                    yield np.ascontiguousarray(states.transpose(0, 2, 1, 3, 4)), prompt

    def prompts(self) -> list[str]:
        """The prompts of all trajectories."""
        found = []
        for database, count in zip(self.folders, self._counts, strict=True):
            with _open(database) as read:
                found += [read(f"prompts_{i}_data").decode("utf-8") for i in range(count)]
        return found


def import_lmdb(
    source: Path, out: Path, *, sigmas: tuple[float, ...], shift: float, batch: int = 8
) -> None:
    """Copy the states that a student with these noise levels needs into a folder of shards.

    The embeddings of the prompts (`OdeLmdb.prompts`) are the caller's to add. Shards that are there
    are kept. UserError if the file has no state at one of the levels.
    """
    if batch < 1:
        raise UserError(f"--batch must be at least 1, got {batch}")
    data = OdeLmdb(source)
    stored = data.sigmas(shift)
    index = []
    for sigma in sigmas:
        nearest = min(range(data.levels), key=lambda i: abs(stored[i] - sigma))
        if abs(stored[nearest] - sigma) > 1e-6:
            levels = ", ".join(f"{s:.4f}" for s in stored)
            raise UserError(
                f"{source} has no state at sigma {sigma:.4f}: with shift {shift:g} its states are "
                f"at {levels}"
            )
        index.append(nearest)
    facts = {
        "sigmas": list(sigmas), "shift": shift, "clips": data.count, "batch": batch,
        "made_by": f"lmdb {source.name}",
    }  # fmt: skip
    begin(out, facts)
    sizes = [min(batch, data.count - start) for start in range(0, data.count, batch)]
    for number, size in enumerate(sizes):
        path = out / shard_name(number)
        if read_header(path) is None:
            start = number * batch
            rows = list(data.read(range(start, start + size)))
            states = np.stack([s[[*index, data.levels]] for s, _ in rows])
            write_shard(path, states, [[prompt] for _, prompt in rows], tensor="states")
        print(f"shards {number + 1}/{len(sizes)}", file=sys.stderr, flush=True)
    finish(out, facts, sizes)


def _databases(folder: Path) -> list[Path]:
    if (folder / "data.mdb").is_file():
        return [folder]
    found = sorted(p.parent for p in folder.glob("*/data.mdb"))
    if not found:
        raise UserError(f"{folder} is no LMDB: no data.mdb in it or in a folder of it")
    return found


@contextmanager
def _open(folder: Path) -> Iterator[Any]:
    """Hands out read(key) -> bytes; UserError for a damaged database or a key that is missing."""
    try:
        import lmdb
    except ImportError:
        raise UserError(
            "reading LMDB needs the package lmdb; install it with: pip install 'aad1[lmdb]'"
        ) from None
    try:
        with lmdb.open(
            str(folder), readonly=True, lock=False, readahead=False, meminit=False
        ) as env, env.begin() as transaction:  # fmt: skip

            def read(name: str) -> bytes:
                value = transaction.get(name.encode())
                if value is None:
                    raise UserError(f"{folder} has no key {name}: not an ODE database")
                return bytes(value)

            yield read
    except lmdb.Error as error:
        raise UserError(f"{folder} cannot be read as LMDB: {error}") from None


def _shape(raw: bytes, folder: Path) -> tuple[int, ...]:
    try:
        shape = tuple(int(number) for number in raw.decode().split())
    except ValueError:
        shape = ()
    if len(shape) != 6 or min(shape) < 1 or shape[1] < 2:
        raise UserError(f"{folder}: latents_shape must be N, n + 1, F, C, h, w, got {raw!r}")
    return shape
