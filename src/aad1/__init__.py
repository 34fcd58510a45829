"""aad1: one-step streaming video from a bidirectional diffusion model (paper: AAD-1).

    pipe = aad1.Pipeline.from_pretrained("doom")
    frames = pipe("frame.png", "turn left")          # uint8 [frames, height, width, 3]
    for frames in pipe.stream("frame.png", "turn left"): ...

Names are imported when first used, so `import aad1` is quick and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aad1.core.chunks import ChunkGeometry
    from aad1.errors import UserError
    from aad1.models.discriminator import Discriminator, DiscriminatorConfig
    from aad1.models.dit import WanConfig, WanTransformer
    from aad1.pipeline import Pipeline
    from aad1.rollout.stream import Rollout

_HOMES = {
    "ChunkGeometry": "aad1.core.chunks",
    "Discriminator": "aad1.models.discriminator",
    "DiscriminatorConfig": "aad1.models.discriminator",
    "Pipeline": "aad1.pipeline",
    "Rollout": "aad1.rollout.stream",
    "UserError": "aad1.errors",
    "WanConfig": "aad1.models.dit",
    "WanTransformer": "aad1.models.dit",
}
__all__ = [
    "ChunkGeometry",
    "Discriminator",
    "DiscriminatorConfig",
    "Pipeline",
    "Rollout",
    "UserError",
    "WanConfig",
    "WanTransformer",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'aad1' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
