"""What a world hands out: clips with one caption per chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Clips:
    """A batch of videos with captions.

    video: uint8 [B, T, H, W, 3].
    captions: B lists, one caption per chunk; chunk 0 is the image and carries the caption of
        chunk 1 (a T2V teacher draws the first frame too, so it needs one).
    """

    video: torch.Tensor
    captions: list[list[str]]

    def __post_init__(self) -> None:
        if self.video.dim() != 5 or self.video.shape[-1] != 3 or self.video.dtype != torch.uint8:
            raise ValueError(
                f"video must be uint8 [B, T, H, W, 3], got {self.video.dtype} "
                f"{list(self.video.shape)}"
            )
        if len(self.captions) != self.video.shape[0]:
            raise ValueError(f"{len(self.captions)} captions for {self.video.shape[0]} videos")
