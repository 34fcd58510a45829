"""The captions, and what they ask of the player."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Action:
    """Thrust ahead and to the right (1 = walking), turn to the right (1 = turning)."""

    ahead: float = 0.0
    right: float = 0.0
    turn: float = 0.0


STILL = "stand still"
ACTIONS: dict[str, Action] = {
    "walk forward": Action(ahead=1),
    "walk backward": Action(ahead=-1),
    "turn left": Action(turn=-1),
    "turn right": Action(turn=1),
    "turn left while walking": Action(ahead=1, turn=-1),
    "turn right while walking": Action(ahead=1, turn=1),
    "strafe left": Action(right=-1),
    "strafe right": Action(right=1),
    STILL: Action(),
}
CAPTIONS: tuple[str, ...] = tuple(ACTIONS)
WORDS: tuple[str, ...] = tuple(sorted({word for caption in CAPTIONS for word in caption.split()}))
