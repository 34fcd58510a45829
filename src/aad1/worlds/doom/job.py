"""A recording on disk: which shards it has, and which are still to make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aad1.data import shards as shard_files
from aad1.errors import UserError
from aad1.worlds.doom.config import DoomConfig, Split, config_from_dict

# Part of a recording's identity: raise it when the same config comes to mean other clips.
_VERSION = 1


class Shard(NamedTuple):
    """A shard of a recording; all but the last one have the config's number of clips."""

    number: int
    clips: int

    @property
    def name(self) -> str:
        """Its file."""
        return shard_files.shard_name(self.number)


@dataclass(frozen=True)
class Job:
    """What is recorded, and where to. With a shard's number, the first three give its content."""

    config: DoomConfig
    split: Split
    seed: int
    folder: Path

    def shards(self, clips: int) -> list[Shard]:
        """The shards that hold `clips` clips."""
        whole, rest = divmod(clips, self.config.clips_per_shard)
        sizes = [self.config.clips_per_shard] * whole + [rest] * (rest > 0)
        return [Shard(number, size) for number, size in enumerate(sizes)]

    def has(self, shard: Shard) -> bool:
        """Whether a shard is there: complete, and of this recording."""
        header = shard_files.read_header(self.folder / shard.name) or {}
        return self._stamp(shard).items() <= header.items()

    def write(
        self, shard: Shard, video: npt.NDArray[np.uint8], captions: Sequence[Sequence[str]]
    ) -> None:
        """Write a shard."""
        path = self.folder / shard.name
        shard_files.write_shard(path, video, captions, metadata=self._stamp(shard))

    def _stamp(self, shard: Shard) -> dict[str, str]:
        content = [_VERSION, self.config.as_dict(), self.split, self.seed]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return {"identity": digest[:16], "clips": str(shard.clips)}

    def check_folder(self) -> None:
        """Raises UserError if the folder holds another recording."""
        if not (self.folder / shard_files.MANIFEST).exists():
            return
        manifest = shard_files.read_manifest(self.folder)
        found = (manifest["world"], manifest["split"], manifest["seed"], manifest["config"])
        if found != ("doom", self.split, self.seed, self.config.as_dict()):
            raise UserError(
                f"{self.folder} holds another recording ({found[0]}, split {found[1]}, seed "
                f"{found[2]}): give an empty folder, or delete that one"
            )

    def write_manifest(self, shards: Sequence[Shard]) -> None:
        """Write the manifest that makes shards a recording."""
        shard_files.write_manifest(
            self.folder,
            world="doom",
            split=self.split,
            seed=self.seed,
            config=self.config.as_dict(),
            shards=[(shard.name, shard.clips) for shard in shards],
        )

    def to_json(self) -> str:
        """The job as one line, for a worker process."""
        return json.dumps(
            {
                "config": self.config.as_dict(),
                "split": self.split,
                "seed": self.seed,
                "folder": str(self.folder.resolve()),
            }
        )

    @staticmethod
    def from_json(line: str) -> Job:
        """The inverse of to_json."""
        values = json.loads(line)
        config, folder = config_from_dict(values["config"]), Path(values["folder"])
        return Job(config, values["split"], values["seed"], folder)
