"""Clips: walks played, filmed and checked, until a shard is full."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from aad1.errors import UserError
from aad1.worlds.doom.actions import STILL
from aad1.worlds.doom.config import DoomConfig, Split
from aad1.worlds.doom.game import Game
from aad1.worlds.doom.physics import direction, wrap
from aad1.worlds.doom.space import MapSpace
from aad1.worlds.doom.wads import read_map, wad_of, wad_path
from aad1.worlds.doom.walk import Start, Walk, draw_captions, draw_walk, find_start

_Bytes = npt.NDArray[np.uint8]

# A reading may differ from the plan by this much before the clip is thrown away: map units of
# position (the player was held up, slid along something or was carried), degrees of heading.
_POSITION_TOLERANCE = 12.0
_HEADING_TOLERANCE = 1.0
_ATTEMPTS_PER_CLIP = 600
_ATTEMPTS_PER_CAPTION = 60
_FRAMES_OF_CHANGE = 8


class Recorder:
    """Records shards; keeps its games and maps from one shard to the next, until it is closed."""

    def __init__(self, config: DoomConfig) -> None:
        self.config = config
        self._games: dict[str, Game] = {}
        self._spaces: dict[str, MapSpace] = {}

    def close(self) -> None:
        """End the games."""
        for game in self._games.values():
            game.close()
        self._games.clear()

    def game(self, name: str) -> Game:
        """The game that has a map."""
        wad = wad_of(name)
        if wad not in self._games:
            self._games[wad] = Game(self.config, wad)
        return self._games[wad]

    def space(self, name: str) -> MapSpace:
        """The space on a map."""
        if name not in self._spaces:
            self._spaces[name] = MapSpace(read_map(wad_path(wad_of(name)), name))
        return self._spaces[name]

    def shard(
        self, split: Split, seed: int, number: int, clips: int
    ) -> tuple[_Bytes, list[list[str]]]:
        """Record the first `clips` clips of shard `number`: video [clips, T, H, W, 3], captions.

        Raises UserError if a map has no place for what is asked.
        """
        config = self.config
        rng = np.random.default_rng([seed, ("train", "heldout").index(split), number])
        maps = config.maps(split)
        order = rng.permutation(len(maps))
        video = np.empty((clips, config.frames, config.height, config.width, 3), np.uint8)
        captions: list[list[str]] = []
        per_map = math.ceil(config.clips_per_shard / config.maps_per_shard)
        for clip in range(clips):
            if clip % per_map == 0:
                name = maps[order[clip // per_map % len(maps)]]
                self._enter(name, rng)
            captions.append(self._clip(name, rng, video[clip]))
        return video, captions

    def _enter(self, name: str, rng: np.random.Generator) -> None:
        self.game(name).enter(name, int(rng.integers(1, 2**31)))

    def _clip(self, name: str, rng: np.random.Generator, video: _Bytes) -> list[str]:
        """Film a walk on the map that was entered, into video [T, H, W, 3]; its captions."""
        game, space = self.game(name), self.space(name)
        # The captions are kept while speed and place are drawn anew, so that an action that needs
        # much space does not become rarer; only where a map has no place for it do they change.
        captions = draw_captions(self.config, rng)
        faults: Counter[str] = Counter()
        for attempt in range(_ATTEMPTS_PER_CLIP):
            if attempt and attempt % _ATTEMPTS_PER_CAPTION == 0:
                captions = draw_captions(replace(self.config, still_share=0), rng)
            walk = draw_walk(self.config, captions, rng)
            start = find_start(space, walk, rng)
            if start is None:
                faults["no space"] += 1
                continue
            fault = film(self.config, game, walk, start, video)
            if game.over:
                self._enter(name, rng)
            if fault is None:
                return captions
            faults[fault] += 1
        raise UserError(
            f"doom map {name}: no clip in {_ATTEMPTS_PER_CLIP} attempts "
            f"({dict(faults)}); leave the map out or ask for less"
        )


def film(config: DoomConfig, game: Game, walk: Walk, start: Start, video: _Bytes) -> str | None:
    """Play a walk and write its frames into video [T, H, W, 3].

    Returns None, or what is wrong with the clip, at the first frame where anything is.
    """
    facing = direction(start.heading)
    if not game.go_to(*start, walk.velocity * facing):
        return "start"
    game.play(walk.controls[0], 1)
    for index in range(config.frames):
        if index:
            game.play(walk.controls[index * config.tics_per_frame], config.tics_per_frame)
        if not game.frame(video[index]):
            return "level ended"
        planned = start.position + walk.path[index] * facing
        if abs(game.position - planned) > _POSITION_TOLERANCE:
            return "held up"
        turned = float(walk.headings[index])
        if abs(wrap(game.heading - start.heading - turned)) > _HEADING_TOLERANCE:
            return "heading"
        chunk, frame_of_chunk = divmod(index, config.chunk_frames)
        if not frame_of_chunk:
            fault = picture_fault(config, video, index, walk.captions[chunk])
            if fault:
                return fault
    return None


def picture_fault(config: DoomConfig, video: _Bytes, index: int, caption: str) -> str | None:
    """What is wrong with frame `index`, the last one of a chunk with this caption, if anything."""
    frame = video[index]
    if frame.mean() < config.min_brightness:
        return "dark"
    if frame.std(axis=(0, 1)).mean() < config.min_contrast:
        return "plain"
    if index and caption != STILL:
        before = video[index - min(_FRAMES_OF_CHANGE, config.chunk_frames)].astype(np.int16)
        if np.abs(frame - before).mean() < config.min_change:
            return "still"
    return None
