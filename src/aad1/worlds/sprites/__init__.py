"""The drawn world: striped shapes bouncing over a panning texture, with captions and exact state.

One frame stands for one latent frame, so 21 frames are the paper's 5 s and 81 its 20 s. The first
frame and the caption leave several futures open: the speed word names a range only, the direction
word a cone, spin is free, and a panning camera reveals texture that nothing foretells.

Every number of a clip is a hash of (seed, clip index, what it is for), and texture is a hash of its
lattice point. So clip k of a seed is the same whatever the batch, a longer clip starts with the
shorter one, and the texture has no edge however far the camera travels.

    words      the vocabulary, and captions
    config     what is drawn
    lots       random numbers as hashes
    state      what happens in a clip
    texture    the background
    shapes     what is painted over it
    clips      draw, batches, render

Each imports only from those above it.
"""

from aad1.worlds.sprites.clips import batches, draw, render
from aad1.worlds.sprites.config import SpritesConfig
from aad1.worlds.sprites.state import SpritesState
from aad1.worlds.sprites.words import COLORS, DIRECTIONS, MAX_WORDS, SHAPES, SPEEDS, WORDS

__all__ = [
    "COLORS",
    "DIRECTIONS",
    "MAX_WORDS",
    "SHAPES",
    "SPEEDS",
    "WORDS",
    "SpritesConfig",
    "SpritesState",
    "batches",
    "draw",
    "render",
]
