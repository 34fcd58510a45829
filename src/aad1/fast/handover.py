"""Frames from the device to host memory, without making the next chunk wait."""

from __future__ import annotations

import time

import torch


class Handover:
    """Times a decode, and copies its frames to the host in the background.

    Between `begin` and `send` the frames are decoded; `wait` returns them. What is launched after
    `send` runs while the host waits for the frames and looks at them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.decode_seconds = 0.0
        """Of all decodes so far, on the device's own clock."""
        if self._cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    def begin(self) -> None:
        """Just before the decode."""
        if self._cuda:
            self._events[0].record()
        else:
            self._began = time.perf_counter()

    def send(self, frames: torch.Tensor) -> None:
        """Just after it: frames uint8 of any shape, on the device."""
        if not self._cuda:
            self.decode_seconds += time.perf_counter() - self._began
            self._host = frames.cpu()
            return
        self._events[1].record()
        # PyTorch keeps pinned memory that was let go of, so this allocates only a few times.
        self._host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
        self._host.copy_(frames, non_blocking=True)
        self._events[2].record()

    def wait(self) -> torch.Tensor:
        """The frames in host memory; they stay as they are for as long as they are held."""
        if self._cuda:
            self._events[2].synchronize()
            self.decode_seconds += self._events[0].elapsed_time(self._events[1]) / 1000
        return self._host
