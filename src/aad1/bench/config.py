"""What `aad1 bench` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Time every stage of streaming in the steady state, after a warm-up that is timed too.

    Example: aad1 bench --model 1.3b --baseline --ablate --json bench.json
    """

    model: str = "tiny"
    """tiny, 1.3b or 14b (random weights, made on the device), or a model folder or packaged
    name, whose own geometry and noise levels are used."""
    size: str = ""
    """WIDTHxHEIGHT in pixels; 832x480 for random weights (tiny: 64x48), else the model's own."""
    chunk: int = 4
    """Latent frames generated per pass."""
    sink: int = 1
    """First latent frames that every chunk sees."""
    window: int = 9
    """Latent frames visible to a chunk in all."""
    steps: int = 1
    """Noise levels per chunk: 1, 2 or 4."""
    chunks: int = 20
    """Chunks measured, once the window is full."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto (bfloat16 on cuda, float32 on cpu), float32, bfloat16 or float16."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    seed: int = 0
    """Of weights, noise and picture."""
    fp8: bool = False
    """float8 linears in the blocks."""
    add: str = ""
    """Parts of the fast path to turn on that are off, such as triton,graph."""
    without: str = ""
    """Parts to turn off, such as compile,cudnn."""
    baseline: bool = False
    """Measure the untuned path too, and how far both videos differ."""
    ablate: bool = False
    """Measure again with each part turned off by itself."""
    merged: bool = False
    """Measure one pass per chunk for offline generation too."""
    profile: bool = False
    """Tell what the fast path's kernels do in one chunk's time; on cuda."""
    no_decode: bool = False
    """Leave the decoder out."""
    decoder: str = ""
    """A tiny decoder's file (TAEHV layout), or "random" for one with random weights; the baseline
    keeps the codec's own."""
    json: Path | None = None
    """File for the figures."""
