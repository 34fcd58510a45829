"""The `doom` world: scripted walks through Freedoom's maps, recorded with ViZDoom.

A clip is 81 frames of 128x96, one every 2 tics (17.5 a second): one image and 5 chunks of 16. A
player without weapon, HUD or enemies does one thing throughout ("walk forward", "turn left while
walking", ...), or, in a third of the clips, changes to another at a chunk boundary. What the
captions say is what happens: a walk is planned on a grid of the map's walls, so that the player
has the space for it, played, and thrown away if the game's own position and angle readings differ
from the plan or if the picture is too dark, too plain or too still.

Training and held-out clips come from different maps.

Recording runs in worker processes, one game each. A shard's content depends on the config, split,
seed and its own number alone: not on the number of workers, nor on which shards were there before.

Needs `vizdoom` (the `doom` extra), which brings the engine and the Freedoom data.

    what is given   actions    captions, and what they ask of the player
                    physics    how thrust and friction move the player
                    wads       Freedoom's maps as files
                    config     what is recorded
    one clip        space      where on a map the player can stand
                    walk       a clip's script, and a place that has the space for it
                    camera     from the drawn screen to a frame
                    game       the engine
                    clips      walks played, filmed and checked, until a shard is full
    many clips      job        which shards a recording has, on disk and still to make
                    worker     a process that records shards
                    pool       several of them
                    recording  record, record_clips

Each imports only from those above it.
"""

from aad1.worlds.doom.actions import ACTIONS, CAPTIONS, WORDS
from aad1.worlds.doom.config import (
    MAPS_HELDOUT,
    MAPS_TRAIN,
    DoomConfig,
    Split,
    config_from_dict,
)
from aad1.worlds.doom.recording import record, record_clips

__all__ = [
    "ACTIONS",
    "CAPTIONS",
    "MAPS_HELDOUT",
    "MAPS_TRAIN",
    "WORDS",
    "DoomConfig",
    "Split",
    "config_from_dict",
    "record",
    "record_clips",
]
