"""The drawn world: striped shapes bouncing over a panning texture, with captions and exact state.

One frame stands for one latent frame, so 21 frames are the paper's 5 s and 81 its 20 s. The first
frame and the caption leave several futures open: the speed word names a range only, the direction
word a cone, spin is free, and a panning camera reveals texture that nothing foretells.

Every number of a clip is a hash of (seed, clip index, what it is for), and texture is a hash of its
lattice point. So clip k of a seed is the same whatever the batch, a longer clip starts with the
shorter one, and the texture has no edge however far the camera travels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aad1.data.batch import Clips
from aad1.errors import UserError

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.93, 0.16, 0.16),
    "green": (0.13, 0.80, 0.25),
    "blue": (0.18, 0.36, 0.98),
    "yellow": (0.99, 0.87, 0.10),
    "purple": (0.72, 0.22, 0.92),
    "white": (0.98, 0.98, 0.98),
}
"""Colour word -> RGB in [0, 1]."""

# Shape word -> (corners, circumradius / nominal radius, inner radius / circumradius). A regular
# n-gon is a star whose inner vertices lie on the edges; the circle is a 24-gon.
_SHAPES: dict[str, tuple[int, float, float]] = {
    "square": (4, 1.25, math.cos(math.pi / 4)),
    "circle": (24, 1.05, math.cos(math.pi / 24)),
    "triangle": (3, 1.45, math.cos(math.pi / 3)),
    "star": (5, 1.45, 0.5),
}
SHAPES: tuple[str, ...] = tuple(_SHAPES)
DIRECTIONS: dict[str, float] = {
    "right": 0.0,
    "down": math.pi / 2,
    "left": math.pi,
    "up": -math.pi / 2,
}
"""Direction word -> heading in radians; x points right, y points down."""
SPEEDS: tuple[str, ...] = ("slow", "fast")
WORDS: tuple[str, ...] = (
    *COLORS,
    *SHAPES,
    "moves",
    *DIRECTIONS,
    *SPEEDS,
    "camera",
    "pans",
    "stays",
)
"""Every word a caption can hold; commas and semicolons separate phrases and carry no meaning."""
MAX_WORDS = 16
"""No caption has more words than this."""

_FRAMES_AT_ONCE = 1024  # keeps the working set of the renderer near 100 MB


@dataclass(frozen=True, kw_only=True)
class SpritesConfig:
    """The drawn world's knobs; lengths are shares of the frame's side, so they fit any size."""

    size: int = 64
    """Height and width of a frame in pixels."""
    frames: int = 21
    """Frames per clip; 21 stand for 5 s, 81 for 20 s."""
    num_sprites: int = 2
    """Shapes per clip, 1 to 3; with 3 the captions leave out the speed word to stay short."""
    frames_per_chunk: int = 4
    """Frames that share one caption; the first frame is a chunk of its own."""
    texture_frequency: float = 1.0
    """Multiplies the spatial frequencies of the texture; at 1 its cells are 1/4, 1/8 and 1/16."""
    texture_contrast: float = 1.0
    """Multiplies the texture's contrast."""
    pan_share: float = 0.8
    """Share of the clips in which the camera pans."""
    pan_speed: tuple[float, float] = (0.008, 0.022)
    """Camera speed, least and most, in frame sides per frame."""
    slow_speed: tuple[float, float] = (0.006, 0.016)
    """What "slow" allows, in frame sides per frame."""
    fast_speed: tuple[float, float] = (0.022, 0.036)
    """What "fast" allows; without a speed word all from the least slow to the most fast is open."""
    heading_spread: float = 0.3
    """Half-width in radians of the cone of headings that one direction word allows."""
    max_spin: float = 0.12
    """Fastest rotation of a shape, in radians per frame."""
    radius: tuple[float, float] = (0.095, 0.13)
    """Nominal radius of a shape, least and most, in frame sides."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("size", 16, 1024),
            ("frames", 1, 100_000),
            ("num_sprites", 1, 3),
            ("frames_per_chunk", 1, 1024),
            ("texture_frequency", 0.1, 8.0),
            ("texture_contrast", 0.0, 4.0),
            ("pan_share", 0.0, 1.0),
            ("heading_spread", 0.0, math.pi / 4),
            ("max_spin", 0.0, math.pi),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"sprites {name} must be between {low} and {high:g}, got {value}")
        for name, most in (
            ("pan_speed", 0.25),
            ("slow_speed", 0.25),
            ("fast_speed", 0.25),
            ("radius", 0.2),
        ):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= most:
                raise UserError(
                    f"sprites {name} must rise within 0 and {most}, got ({low:g}, {high:g})"
                )
        if self.radius[0] <= 0:
            raise UserError(f"sprites radius must be above 0, got {self.radius[0]:g}")

    @property
    def num_chunks(self) -> int:
        """Captions per clip: the image's and one per chunk begun."""
        return 1 + math.ceil((self.frames - 1) / self.frames_per_chunk)


@dataclass(frozen=True, kw_only=True)
class SpritesState:
    """What truly happened in a batch of clips; float64 and int64 on the CPU, (x, y) in pixels.

    Moving the camera by d moves the background on the screen by -d; shapes live on the screen.
    """

    camera: Tensor
    """[B, T, 2] position of the frame's corner on the texture; (0, 0) at the first frame."""
    position: Tensor
    """[B, T, S, 2] centre of each shape on the screen; pixel centres are at integers + 0.5."""
    velocity: Tensor
    """[B, T, S, 2] pixels per frame, with the sign it has after the bounces so far."""
    angle: Tensor
    """[B, T, S] rotation in radians."""
    color: Tensor
    """[B, S] index into `COLORS`."""
    shape: Tensor
    """[B, S] index into `SHAPES`."""
    radius: Tensor
    """[B, S] nominal radius in pixels."""
    texture: Tensor
    """[B] hash that names the texture."""
    palette: Tensor
    """[B, 3, 3] the texture's mean RGB and the two directions in which it varies."""


def draw(
    config: SpritesConfig,
    count: int,
    *,
    seed: int | torch.Generator,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Clips, SpritesState]:
    """Draws clips start .. start + count - 1 of a seed.

    seed: an int, or a CPU generator from which one is drawn.
    Returns the clips (uint8 [count, frames, size, size, 3] on the device) and their exact state.
    Raises UserError for a count or start below what makes sense.
    """
    if count < 1:
        raise UserError(f"the number of clips must be at least 1, got {count}")
    if start < 0:
        raise UserError(f"the first clip's index must be at least 0, got {start}")
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
    state, captions = _draw_state(config, _clip_keys(seed, start, count))
    clips = Clips(
        video=render(config, state, device=device),
        captions=[[caption] * config.num_chunks for caption in captions],
    )
    return clips, state


def batches(
    config: SpritesConfig, batch_size: int, *, seed: int, device: torch.device | str = "cpu"
) -> Iterator[Clips]:
    """Draws endless batches: clips 0 .. batch_size - 1 of the seed, then the next ones."""
    start = 0
    while True:
        yield draw(config, batch_size, seed=seed, start=start, device=device)[0]
        start += batch_size


def render(
    config: SpritesConfig, state: SpritesState, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Draws the frames of a state: uint8 [B, T, size, size, 3] on the device."""
    batch, frames = state.camera.shape[:2]
    video = torch.empty(
        batch, frames, config.size, config.size, 3, dtype=torch.uint8, device=device
    )
    clips_at_once = max(1, _FRAMES_AT_ONCE // frames)
    for first in range(0, batch, clips_at_once):
        part = slice(first, min(first + clips_at_once, batch))
        image = _draw_texture(config, state, part, device)
        for sprite in range(state.color.shape[1]):
            _draw_sprite(config, state, part, sprite, image)
        pixels = image.mul_(255.0).add_(0.5).to(torch.uint8)
        video[part] = pixels.view(-1, frames, config.size, config.size, 3)
    return video


# --- drawing lots: everything is a hash, so nothing depends on the batch -------------------------

_MASK = 0xFFFFFFFF


def _mix(value: Tensor) -> Tensor:
    """A 32-bit integer hash (two multiply-xorshift rounds) on int64 tensors."""
    value = value & _MASK
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK
    value = ((value ^ (value >> 15)) * 0x6C8E9CF5) & _MASK
    return value ^ (value >> 16)


def _clip_keys(seed: int, start: int, count: int) -> Tensor:
    """int64 [count, 2]: two 32-bit keys per clip, so that 64 bits of seed and index matter."""
    index = torch.arange(start, start + count, dtype=torch.int64)
    words = [seed & _MASK, (seed >> 32) & _MASK]
    keys = []
    for salt in (0x3C6EF372, 0x1B873593):
        key = _mix(torch.full_like(index, salt))
        for word in words:
            key = _mix(key + word)
        key = _mix(_mix(key + (index & _MASK)) + (index >> 32))
        keys.append(key)
    return torch.stack(keys, dim=1)


class _Lots:
    """Uniform numbers of each clip, one stream per clip; float64 [B, ...]."""

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys
        self._drawn = 0

    def uniform(self, *shape: int) -> Tensor:
        """[B, *shape] in [0, 1)."""
        number = math.prod(shape)
        counter = torch.arange(self._drawn, self._drawn + number, dtype=torch.int64)
        self._drawn += number
        bits = _mix(_mix(self._keys[:, :1] + counter * 0x61C88647) + self._keys[:, 1:])
        return (bits.double() / 2**32).view(-1, *shape)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * self.uniform(*shape)

    def integer(self, below: int, *shape: int) -> Tensor:
        return (self.uniform(*shape) * below).long()


def _draw_state(config: SpritesConfig, keys: Tensor) -> tuple[SpritesState, list[str]]:
    """Draws the clips' numbers and words them."""
    lots = _Lots(keys)
    sprites, side = config.num_sprites, config.size
    time = torch.arange(config.frames, dtype=torch.float64)

    # Colours differ within a clip, so a caption can tell the shapes apart: a random first colour,
    # then random ones among those not yet taken.
    color = lots.uniform(len(COLORS)).argsort(dim=1)[:, :sprites]
    shape = lots.integer(len(SHAPES), sprites)
    radius = lots.between(*config.radius, sprites) * side

    heading_word = lots.integer(len(DIRECTIONS), sprites)
    heading = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float64)[heading_word]
    heading = heading + lots.between(-config.heading_spread, config.heading_spread, sprites)
    speed_word = lots.integer(1 + len(SPEEDS), sprites)  # 0: no word
    if sprites > 2:
        speed_word = torch.zeros_like(speed_word)
    ranges = torch.tensor(
        [
            (config.slow_speed[0], config.fast_speed[1]),
            config.slow_speed,
            config.fast_speed,
        ],
        dtype=torch.float64,
    )[speed_word]
    speed = side * (ranges[..., 0] + (ranges[..., 1] - ranges[..., 0]) * lots.uniform(sprites))
    velocity = speed[..., None] * torch.stack([heading.cos(), heading.sin()], dim=-1)

    # Between walls that leave room for the shape. Along its heading a shape starts in the rear
    # 60% of the room, so that it truly moves as the caption says before it bounces.
    outer = torch.tensor([extent for _, extent, _ in _SHAPES.values()], dtype=torch.float64)
    wall = (0.9 * outer[shape] * radius)[..., None]  # [B, S, 1]
    room = side - 2 * wall
    along = torch.stack([heading_word % 2 == 0, heading_word % 2 == 1], dim=-1)
    place = lots.uniform(sprites, 2)
    rear = torch.where(velocity > 0, 0.6 * place, 1 - 0.6 * place)
    place = room * torch.where(along, rear, place)
    travelled = (place[:, None] + velocity[:, None] * time[:, None, None]) / room[:, None]
    # A ball between walls is a triangle wave of the unfolded path.
    lap = travelled.remainder(2.0)
    backwards = lap > 1
    position = wall[:, None] + room[:, None] * torch.where(backwards, 2 - lap, lap)
    velocity = torch.where(backwards, -velocity[:, None], velocity[:, None])
    spin = lots.between(-config.max_spin, config.max_spin, sprites)
    angle = lots.between(-math.pi, math.pi, sprites)[:, None] + spin[:, None] * time[:, None]

    pans = lots.uniform() < config.pan_share
    pan_word = lots.integer(len(DIRECTIONS))
    pan_heading = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float64)[pan_word]
    pan_heading = pan_heading + lots.between(-config.heading_spread, config.heading_spread)
    pan = torch.stack([pan_heading.cos(), pan_heading.sin()], dim=-1)
    pan = pan * (lots.between(*config.pan_speed) * side * pans)[:, None]

    state = SpritesState(
        camera=pan[:, None] * time[:, None],
        position=position,
        velocity=velocity,
        angle=angle,
        color=color,
        shape=shape,
        radius=radius,
        texture=_mix(keys[:, 0] + keys[:, 1] * 3 + 1),
        palette=_draw_palette(lots, config.texture_contrast),
    )
    captions = _captions(color, shape, heading_word, speed_word, pans, pan_word)
    return state, captions


def _draw_palette(lots: _Lots, contrast: float) -> Tensor:
    """[B, 3, 3]: the texture's mean colour and two directions in which it varies, all muted."""
    hue = lots.between(0, 2 * math.pi, 2)
    third = 2 * math.pi / 3
    wheel = torch.tensor([0.0, -third, third], dtype=torch.float64)
    tint = (hue[..., None] + wheel).cos()  # [B, 2, 3]
    brightness = lots.between(0.36, 0.5)[:, None]
    mean = brightness * (1 + 0.2 * tint[:, 0])
    light = brightness * (0.55 + 0.15 * tint[:, 1])
    shift = 0.09 * tint[:, 1] - 0.03 * tint[:, 0]
    return torch.stack([mean, contrast * light, contrast * shift], dim=1)


def _captions(
    color: Tensor,
    shape: Tensor,
    heading_word: Tensor,
    speed_word: Tensor,
    pans: Tensor,
    pan_word: Tensor,
) -> list[str]:
    """One sentence per clip: "red square moves left fast, green star moves up; camera stays"."""
    color_names, directions = tuple(COLORS), tuple(DIRECTIONS)
    captions = []
    for clip in range(color.shape[0]):
        phrases = []
        for sprite in range(color.shape[1]):
            phrase = (
                f"{color_names[int(color[clip, sprite])]} {SHAPES[int(shape[clip, sprite])]} "
                f"moves {directions[int(heading_word[clip, sprite])]}"
            )
            if speed_word[clip, sprite] > 0:
                phrase += f" {SPEEDS[int(speed_word[clip, sprite]) - 1]}"
            phrases.append(phrase)
        camera = f"pans {directions[int(pan_word[clip])]}" if pans[clip] else "stays"
        captions.append(f"{', '.join(phrases)}; camera {camera}")
    return captions


# --- drawing pixels: N = frames of the whole batch ------------------------------------------------

_CELLS = (1 / 4, 1 / 8, 1 / 16)  # lattice spacing of the octaves, in frame sides
_GAINS = (1.0, 0.75, 0.5)
_HUE_CELL = 1 / 3
_SPLINE_STD = 0.317  # of a quadratic B-spline field over uniform lattice values in [-1, 1]


def _draw_texture(
    config: SpritesConfig, state: SpritesState, part: slice, device: torch.device | str
) -> Tensor:
    """The background of some clips: float [N, H * W, 3] in [0, 1]."""
    camera = state.camera[part].flatten(0, 1)
    frames = state.camera.shape[1]
    key = state.texture[part].repeat_interleave(frames)
    side = config.size
    light = torch.zeros(camera.shape[0], side, side, device=device)
    for octave, (cell, gain) in enumerate(zip(_CELLS, _GAINS, strict=True)):
        spacing = max(cell * side / config.texture_frequency, 2.0)
        light += _spline_field(camera, key + octave, spacing, side, device).mul_(gain)
    scale = 1 / (_SPLINE_STD * math.hypot(*_GAINS))
    light = torch.tanh(light.mul_(scale))
    hue = _spline_field(camera, key + 7, _HUE_CELL * side, side, device)
    palette = state.palette[part].repeat_interleave(frames, dim=0).to(device, torch.float32)
    basis = torch.stack([light, hue.mul_(1 / _SPLINE_STD)], dim=-1).flatten(1, 2)
    return torch.baddbmm(palette[:, :1], basis, palette[:, 1:]).clamp_(0, 1)


def _spline_field(
    camera: Tensor, key: Tensor, spacing: float, side: int, device: torch.device | str
) -> Tensor:
    """A smooth random field on the plane, seen through the cameras: float [N, side, side].

    Random values on a lattice, interpolated by quadratic B-splines. The kernel is separable, so a
    frame is rows @ values @ columns^T with the few lattice points under it, exact at any subpixel
    offset.
    """
    points = math.ceil(side / spacing) + 4  # the splines reach 1.5 cells past the frame
    first = torch.floor(camera / spacing).long() - 1  # [N, 2]
    inside = (camera / spacing - first).to(device, torch.float32)  # of pixel 0, in cells
    lattice = (first[:, :, None] + torch.arange(points)).to(device)  # [N, 2, points]
    key = key.to(device)[:, None]
    column = _mix(lattice[:, 0] + key * 0x2545F491)
    values = _mix(column[:, None, :] + _mix(lattice[:, 1] + key)[:, :, None] * 5)
    values = values.float().mul_(2 / 2**32).sub_(1)  # [N, rows, columns]
    pixel = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / spacing
    distance = (
        inside[:, :, None, None]
        + pixel[:, None]
        - torch.arange(points, device=device, dtype=torch.float32)
    ).abs_()
    near = 0.75 - distance.square()
    far = (1.5 - distance).clamp_(min=0).square_().mul_(0.5)
    weight = torch.where(distance < 0.5, near, far)  # [N, 2, side, points]
    return torch.bmm(torch.bmm(weight[:, 1], values), weight[:, 0].transpose(1, 2))


def _draw_sprite(
    config: SpritesConfig, state: SpritesState, part: slice, sprite: int, image: Tensor
) -> None:
    """Paints one shape of every clip over image [N, H * W, 3], inside a window around it."""
    frames, side, device = state.camera.shape[1], config.size, image.device
    shapes = torch.tensor(list(_SHAPES.values()), dtype=torch.float64)

    def per_frame(clip_values: Tensor) -> Tensor:
        return clip_values.repeat_interleave(frames, dim=0).to(device, torch.float32)

    corners, extent, inner = shapes[state.shape[part, sprite]].unbind(1)
    outer = extent * state.radius[part, sprite]
    window = min(side, math.ceil(2 * 1.45 * config.radius[1] * side) + 3)
    center = state.position[part, :, sprite].flatten(0, 1)
    origin = (center - window / 2).round().clamp(0, side - window).long()
    grid = torch.arange(window)
    column = origin[:, :1] + grid
    row = origin[:, 1:] + grid
    target = (row[:, :, None] * side + column[:, None, :]).flatten(1).to(device)
    x = (column + 0.5 - center[:, :1]).to(device, torch.float32)[:, None, :]
    y = (row + 0.5 - center[:, 1:]).to(device, torch.float32)[:, :, None]
    angle = state.angle[part, :, sprite].flatten().to(device, torch.float32)[:, None, None]
    across = x * angle.cos() + y * angle.sin()
    along = y * angle.cos() - x * angle.sin()

    # Signed distance to a star: fold the plane into one half-sector, where the outline is the line
    # from the outer vertex (outer, 0) to the inner one.
    half = per_frame(math.pi / corners)[:, None, None]
    outer_n = per_frame(outer)[:, None, None]
    inner_n = outer_n * per_frame(inner)[:, None, None]
    length = (across.square() + along.square()).sqrt_()
    folded = torch.atan2(along, across).remainder_(2 * half)
    folded = torch.minimum(folded, 2 * half - folded)
    edge_x, edge_y = inner_n * half.cos() - outer_n, inner_n * half.sin()
    outside = (length * folded.cos() - outer_n) * edge_y - length * folded.sin() * edge_x
    outside = outside / torch.hypot(edge_x, edge_y)

    alpha = (0.5 - outside).clamp_(0, 1)
    border = side / 64
    ink = (outside + 0.5 + border).clamp_(0, 1)  # a dark rim
    period = per_frame(state.radius[part, sprite])[:, None, None] * 0.8
    stripe = torch.tanh(3 * torch.sin(2 * math.pi / period * across))
    shade = (0.8 + 0.2 * stripe) * (1 - 0.8 * ink)
    colors = torch.tensor(list(COLORS.values()))[state.color[part, sprite]]
    paint = shade.flatten(1)[..., None] * per_frame(colors)[:, None, :]
    under = target[..., None].expand(-1, -1, 3)
    behind = image.gather(1, under)
    image.scatter_(1, under, behind.lerp_(paint, alpha.flatten(1)[..., None]))
