"""Recording: from what is asked to shards in a folder, or clips in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aad1.data.shards import ClipShards
from aad1.errors import UserError
from aad1.worlds.doom.config import DoomConfig, Split
from aad1.worlds.doom.job import Job, Shard
from aad1.worlds.doom.pool import record_shards
from aad1.worlds.doom.wads import vizdoom

if TYPE_CHECKING:
    from aad1.data.batch import Clips


def record_clips(config: DoomConfig, *, split: Split = "train", clips: int, seed: int = 0) -> Clips:
    """Record clips with one worker and hand them over in memory (3 MB each).

    They are the first `clips` clips of what `record` writes for the same arguments.

    Raises UserError as `record` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        return record(
            config, split=split, clips=clips, seed=seed, out=Path(folder), workers=1
        ).read_all()


def record(
    config: DoomConfig,
    *,
    split: Split,
    clips: int,
    seed: int,
    out: Path,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ClipShards:
    """Record `clips` clips into shards in the folder `out`, with `workers` processes.

    Complete shards that are there already, of the same config, split and seed, are kept. A worker
    that dies is replaced, and its shard tried once more; a second death or any other error stops
    the recording after the shards in hand.

    progress: called with (clips done, clips in all) as shards come in.

    Raises UserError if vizdoom is missing, an argument is out of range, `out` holds another
    recording, a map has no place for what is asked, or a worker failed.
    """
    if clips < 1:
        raise UserError(f"doom clips {clips}: at least 1")
    if workers < 1:
        raise UserError(f"doom workers {workers}: at least 1")
    config.maps(split)
    vizdoom()
    job = Job(config, split, seed, out)
    job.check_folder()
    shards = job.shards(clips)
    todo = [shard for shard in shards if not job.has(shard)]
    done = clips - sum(shard.clips for shard in todo)

    def finished(shard: Shard) -> None:
        nonlocal done
        done += shard.clips
        if progress is not None:
            progress(done, clips)

    if progress is not None:
        progress(done, clips)
    if todo:
        out.mkdir(parents=True, exist_ok=True)
        error = record_shards(job, todo, workers, finished)
        if error is not None:
            raise UserError(
                f"doom recording stopped at {done} of {clips} clips by {error} "
                f"(what is recorded stays; start again to go on)"
            )
    job.write_manifest(shards)
    return ClipShards(out)
