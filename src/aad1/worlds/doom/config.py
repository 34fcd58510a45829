"""What is recorded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from aad1.errors import UserError
from aad1.worlds.doom.wads import wad_of

Split = Literal["train", "heldout"]

# Maps with rooms or grounds large enough for a walk of 5 seconds, and light enough to see it; the
# held-out ones are of the same kinds (base, town, hell, forest) as those for training.
MAPS_TRAIN: tuple[str, ...] = (
    *("MAP08", "MAP12", "MAP14", "MAP17", "MAP18", "MAP19", "MAP26", "MAP28", "MAP29", "MAP32"),
    *("E1M1", "E1M5", "E1M7", "E2M1", "E2M7", "E3M4", "E3M5", "E4M1", "E4M3", "E4M8"),
)
MAPS_HELDOUT: tuple[str, ...] = ("MAP07", "MAP10", "MAP13", "E1M6", "E2M8", "E3M1", "E4M5")


@dataclass(frozen=True, kw_only=True)
class DoomConfig:
    """What is recorded. Every field takes part in the identity of a recording.

    width, height: size of a frame in pixels, 128x96 or 160x120.
    supersample: the game draws this many times larger each way (2 or 4), and each pixel is the
        mean of what it covers. 4 flickers less on far floors and takes about twice the time.
    softness: standard deviation in pixels of a Gaussian lens before sampling. The game samples its
        textures without any filter; what aliases is noise that no codec or generator can follow.
    frames: frames of a clip, 1 + chunk_frames * chunks.
    chunk_frames: frames of a chunk; captions change at chunk boundaries only.
    tics_per_frame: game tics (35 a second) from frame to frame.
    switch_share: share of clips that change their action once.
    still_share: share of actions drawn as "stand still".
    walk_speed: range of walking speed as a fraction of the game's walk (8.33 map units a tic);
        drawn once per clip.
    turn_speed: range of turning speed in degrees per frame; drawn once per clip.
    gamma: brightening, out = in ** (1 / gamma) on [0, 1]; Doom's rooms are dark.
    min_brightness, min_contrast: mean and standard deviation (0-255) below which a frame is too
        dark or too plain; looked at in the first frame and at the end of each chunk.
    min_change: least mean absolute difference (0-255) between frames 8 apart, unless standing.
    monsters: leave the monsters in (they take no notice of the player).
    maps_train, maps_heldout: maps by name, "MAP01".."MAP32" (Freedoom phase 2) or
        "E1M1".."E4M9" (phase 1); no map may be in both.
    maps_per_shard, clips_per_shard: a shard's clips come from this many maps in turn.

    Raises UserError where a value is out of range.
    """

    width: int = 128
    height: int = 96
    supersample: int = 2
    softness: float = 0.8
    frames: int = 81
    chunk_frames: int = 16
    tics_per_frame: int = 2
    switch_share: float = 1 / 3
    still_share: float = 0.015
    walk_speed: tuple[float, float] = (0.55, 0.75)
    turn_speed: tuple[float, float] = (3.2, 4.8)
    gamma: float = 1.7
    min_brightness: float = 45.0
    min_contrast: float = 14.0
    min_change: float = 3.0
    monsters: bool = False
    maps_train: tuple[str, ...] = MAPS_TRAIN
    maps_heldout: tuple[str, ...] = MAPS_HELDOUT
    maps_per_shard: int = 4
    clips_per_shard: int = 32

    def __post_init__(self) -> None:
        size = (self.width, self.height)
        if size not in ((128, 96), (160, 120)) or self.supersample not in (2, 4):
            raise UserError(
                f"doom frame size {self.width}x{self.height}, supersample {self.supersample}: "
                f"allowed are 128x96 and 160x120, supersample 2 or 4"
            )
        if self.chunk_frames < 1 or self.frames < 2 or (self.frames - 1) % self.chunk_frames:
            raise UserError(
                f"doom frames {self.frames}: must be 1 + a multiple, at least 1, of chunk_frames "
                f"({self.chunk_frames})"
            )
        if not 1 <= self.tics_per_frame <= 35:
            raise UserError(f"doom tics_per_frame {self.tics_per_frame}: allowed are 1 to 35")
        for name in ("switch_share", "still_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"doom {name} {getattr(self, name)}: allowed are 0 to 1")
        for name, top in (("walk_speed", 2.0), ("turn_speed", 45.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise UserError(
                    f"doom {name} {low}, {high}: must be a range within (0, {top:g}], low first"
                )
        if not 0 <= self.softness <= 4:
            raise UserError(f"doom softness {self.softness}: allowed are 0 to 4")
        if not 0.5 <= self.gamma <= 4:
            raise UserError(f"doom gamma {self.gamma}: allowed are 0.5 to 4")
        if self.maps_per_shard < 1 or self.clips_per_shard < 1:
            raise UserError("doom maps_per_shard and clips_per_shard must be at least 1")
        for name in (*self.maps_train, *self.maps_heldout):
            wad_of(name)
        if not self.maps_train or not self.maps_heldout:
            raise UserError("doom maps_train and maps_heldout must each name a map")
        both = set(self.maps_train) & set(self.maps_heldout)
        if both:
            raise UserError(f"doom maps {sorted(both)} are both for training and held out")

    @property
    def chunks(self) -> int:
        """Chunks after the image."""
        return (self.frames - 1) // self.chunk_frames

    def maps(self, split: Split) -> tuple[str, ...]:
        """The maps of a split, "train" or "heldout". Raises UserError for another name."""
        if split not in ("train", "heldout"):
            raise UserError(f"doom split {split!r}: allowed are 'train' and 'heldout'")
        return self.maps_train if split == "train" else self.maps_heldout

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON keeps them (lists for tuples)."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content


def config_from_dict(values: dict[str, Any]) -> DoomConfig:
    """The inverse of DoomConfig.as_dict, as found under "config" in a manifest."""
    fields: dict[str, Any] = {k: tuple(v) if type(v) is list else v for k, v in values.items()}
    return DoomConfig(**fields)
