"""A fast session that can go back: places between chunks, each of which may be continued again.

A session writes into slots that stay where they are, so an earlier place is there only as long as
its slots hold what they held. Going back by the chunk made last costs nothing: its K and V lie in
slots of frames that it does not see, none of which the place before it needs. Whatever a pass is
about to overwrite while some place still needs it is copied first, slot by slot; a place that
nobody holds on to needs nothing. So a live video, which drops the chunk made ahead and otherwise
goes on, copies nothing.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from aad1.fast.rollout import FastRollout
from aad1.rollout.stream import Noise


class _Copy(NamedTuple):
    """What a slot held: K and V [layers, B, L, N, head_dim], K rotated from position 0 at `base`,
    and of a sink frame the time channels of K before rotation."""

    k: torch.Tensor
    v: torch.Tensor
    raw: torch.Tensor | None
    base: int


class Place:
    """Where a video stands between two chunks, its past in the cache. Made by a `Timeline`."""

    def __init__(self, chunk: int, start: int, base: int, needs: dict[int, object]) -> None:
        """needs: by slot, what must be in it (`Timeline.holds`)."""
        self.chunk, self.start, self.base, self.needs = chunk, start, base, needs
        self.copies: dict[int, _Copy] = {}


class Timeline:
    """One video in the making on the fast path, chunk by chunk from any of its places.

    Its memory goes back to the rollout when the timeline is no longer referred to.
    """

    def __init__(self, rollout: FastRollout, batch: int, height: int, width: int) -> None:
        self.geometry = rollout.geometry
        self.session = rollout.session(batch, height, width)
        weakref.finalize(self, rollout.release, self.session).atexit = False
        self.holds: dict[int, object] = {}
        """By slot, a token of what was committed there last; none while it is written to."""
        self._places: weakref.WeakSet[Place] = weakref.WeakSet()

    def begin(self, image: torch.Tensor | None, text: torch.Tensor) -> Place:
        """The start of the video, after its image if it has one; once per timeline."""
        if image is not None:
            self.session.prefill(image, text)
            self._committed(0, image.shape[2])
        return self._place()

    @torch.no_grad()
    def generate(self, place: Place, text: torch.Tensor, noise: Noise) -> torch.Tensor:
        """Clean latents of the chunk after `place`; they are not in the cache yet."""
        self._go_to(place)
        self._overwrite(place)
        return self.session.generate(text, noise)

    @torch.no_grad()
    def commit(self, place: Place, x0: torch.Tensor, text: torch.Tensor) -> Place:
        """The place after the chunk `x0` that was generated at `place`, by its cache pass."""
        self._go_to(place)
        self._overwrite(place)
        self.session.commit(x0, text)
        self._committed(place.start, x0.shape[2])
        return self._place()

    # -- inside -------------------------------------------------------------------------------

    def _place(self) -> Place:
        session = self.session
        seen = self.geometry.kept(session.start, self.geometry.size(session.chunk))
        needs = {slot: self.holds[slot] for f in seen for slot in self._slots(f, 1)}
        place = Place(session.chunk, session.start, session.slots.base, needs)
        self._places.add(place)
        return place

    def _slots(self, start: int, size: int) -> list[int]:
        return [s for a, b in self.session.slots.own(start, size) for s in range(a, b)]

    def _committed(self, start: int, size: int) -> None:
        for slot in self._slots(start, size):
            self.holds[slot] = object()

    def _overwrite(self, place: Place) -> None:
        """The slots of the chunk after `place` are about to be written to."""
        size = self.geometry.size(place.chunk)
        lost = self._slots(place.start, size)
        self._copy(lost)
        for slot in lost:
            self.holds.pop(slot, None)

    def _copy(self, slots: list[int]) -> None:
        """Keep what these slots hold for the places that need it."""
        s = self.session.slots
        for place in list(self._places):
            for slot in slots:
                held = self.holds.get(slot)
                if held is not None and place.needs.get(slot) is held and slot not in place.copies:
                    sink = slot < self.geometry.sink
                    place.copies[slot] = _Copy(
                        s.k[:, :, slot].clone(), s.v[:, :, slot].clone(),
                        s.sink_raw[:, :, slot].clone() if sink else None, s.base,
                    )  # fmt: skip

    def _go_to(self, place: Place) -> None:
        """Stand at `place`, its past in the slots."""
        lost = [slot for slot, token in place.needs.items() if self.holds.get(slot) is not token]
        behind = place.start - len(place.needs) < self.session.slots.base  # positions below 0
        if lost or behind:
            self._restore(place, lost)
        self.session.chunk, self.session.start = place.chunk, place.start

    def _restore(self, place: Place, lost: list[int]) -> None:
        """Bring back what a place needs; slots that it does not need hold nothing afterwards."""
        s, sink = self.session.slots, self.geometry.sink
        rest = [slot for slot in self.holds if slot not in place.needs]
        self._copy([*lost, *rest])
        for slot in rest:
            del self.holds[slot]
        for slot, token in place.needs.items():
            copy = place.copies.get(slot) if slot in lost else None
            if copy is not None:
                s.k[:, :, slot].copy_(copy.k)
                s.v[:, :, slot].copy_(copy.v)
                if copy.raw is not None:
                    s.sink_raw[:, :, slot].copy_(copy.raw)
            moved = (s.base if copy is None else copy.base) - place.base
            if slot >= sink and moved:
                s.turn_slot(slot, moved)
            self.holds[slot] = token
        s.move_base(place.base)
