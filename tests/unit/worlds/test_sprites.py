"""The drawn world: what a clip shows is what its state and its caption say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from aad1.errors import UserError
from aad1.worlds.sprites import (
    COLORS,
    DIRECTIONS,
    MAX_WORDS,
    SHAPES,
    WORDS,
    SpritesConfig,
    SpritesState,
    batches,
    draw,
    render,
)

CONFIG = SpritesConfig(size=48, frames=9)


def words_of(caption: str) -> list[str]:
    return caption.replace(",", " ").replace(";", " ").split()


def sprite_mask(config: SpritesConfig, state: SpritesState) -> torch.Tensor:
    """[B, T, H, W]: pixels within any shape's reach."""
    axis = torch.arange(config.size) + 0.5
    offset_x = axis - state.position[..., 0, None]  # [B, T, S, W]
    offset_y = axis - state.position[..., 1, None]
    square = offset_y[..., :, None] ** 2 + offset_x[..., None, :] ** 2
    reach = 1.45 * state.radius[:, None, :, None, None] + 1.5
    return (square < reach**2).any(dim=2)


def test_a_batch_has_the_agreed_shape_and_one_caption_per_chunk() -> None:
    clips, state = draw(CONFIG, 3, seed=0)
    assert clips.video.shape == (3, 9, 48, 48, 3)
    assert [len(captions) for captions in clips.captions] == [3, 3, 3]  # image, 4 and 4 frames
    assert all(len(set(captions)) == 1 for captions in clips.captions)
    assert state.camera.shape == (3, 9, 2)
    assert state.position.shape == state.velocity.shape == (3, 9, 2, 2)
    assert SpritesConfig().num_chunks == 6
    assert SpritesConfig(frames=1).num_chunks == 1


def test_seed_zero_keeps_its_captions() -> None:
    clips, _ = draw(SpritesConfig(size=16, frames=1), 2, seed=0)
    assert [captions[0] for captions in clips.captions] == [
        "red square moves left, green triangle moves down; camera stays",
        "green square moves up fast, blue triangle moves down slow; camera pans up",
    ]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_captions_are_short_and_speak_the_vocabulary(number: int) -> None:
    config = SpritesConfig(size=16, frames=1, num_sprites=number)
    clips, _ = draw(config, 200, seed=3)
    spoken = {word for captions in clips.captions for word in words_of(captions[0])}
    assert spoken <= set(WORDS)
    assert spoken >= {*COLORS, *SHAPES, *DIRECTIONS, "pans", "stays"}
    assert max(len(words_of(captions[0])) for captions in clips.captions) <= MAX_WORDS


def test_a_clip_depends_on_seed_and_index_only() -> None:
    many, _ = draw(CONFIG, 6, seed=11)
    one, _ = draw(CONFIG, 1, seed=11, start=4)
    assert torch.equal(many.video[4], one.video[0])
    assert many.captions[4] == one.captions[0]
    longer, _ = draw(replace(CONFIG, frames=14), 6, seed=11)
    assert torch.equal(longer.video[:, :9], many.video)
    other, _ = draw(CONFIG, 6, seed=12)
    assert all(not torch.equal(a, b) for a in many.video for b in other.video)
    assert not torch.equal(draw(CONFIG, 1, seed=11 + 2**40)[0].video, many.video[:1])
    stream = batches(CONFIG, 3, seed=11)
    assert torch.equal(torch.cat([next(stream).video, next(stream).video]), many.video)


def test_a_generator_may_stand_for_the_seed() -> None:
    first = draw(CONFIG, 1, seed=torch.Generator().manual_seed(5))[0].video
    again = draw(CONFIG, 1, seed=torch.Generator().manual_seed(5))[0].video
    other = draw(CONFIG, 1, seed=torch.Generator().manual_seed(6))[0].video
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_caption_tells_what_moves_where() -> None:
    config = SpritesConfig(size=64, frames=5)
    clips, state = draw(config, 300, seed=1)
    moved = state.position[:, 4] - state.position[:, 0]
    ranges = {
        "slow": config.slow_speed,
        "fast": config.fast_speed,
        "": (config.slow_speed[0], config.fast_speed[1]),
    }
    speeds: dict[str, list[float]] = {word: [] for word in ranges}
    pans = 0
    for clip, captions in enumerate(clips.captions):
        shapes, camera = captions[0].split("; ")
        for sprite, phrase in enumerate(shapes.split(", ")):
            color, shape, _, direction, *speed = phrase.split()
            assert color == tuple(COLORS)[state.color[clip, sprite]]
            assert shape == SHAPES[state.shape[clip, sprite]]
            x, y = moved[clip, sprite].tolist()
            heading = math.atan2(y, x)
            assert math.cos(heading - DIRECTIONS[direction]) >= math.cos(0.7)
            word = speed[0] if speed else ""
            pace = float(state.velocity[clip, 0, sprite].norm()) / config.size
            assert ranges[word][0] <= pace <= ranges[word][1]
            speeds[word].append(pace)
        dx, dy = state.camera[clip, 1].tolist()
        _, verb, *pan = camera.split()
        assert (verb == "pans") == (math.hypot(dx, dy) > 0)
        if pan:
            pans += 1
            assert math.cos(math.atan2(dy, dx) - DIRECTIONS[pan[0]]) >= math.cos(0.31)
            assert config.pan_speed[0] <= math.hypot(dx, dy) / 64 <= config.pan_speed[1]
    assert 0.72 < pans / 300 < 0.88
    # A word fixes a range only: the speeds under one word fill most of it.
    for word, paces in speeds.items():
        low, high = ranges[word]
        assert max(paces) - min(paces) > 0.8 * (high - low)


def test_shapes_fly_straight_and_bounce_inside_the_frame() -> None:
    config = SpritesConfig(size=64, frames=81)
    _, state = draw(config, 20, seed=2)
    assert state.position.min() > 0
    assert state.position.max() < 64
    speed = state.velocity.norm(dim=-1)
    assert torch.allclose(speed, speed[:, :1].expand_as(speed))
    step = state.position.diff(dim=1)
    straight = (state.velocity[:, 1:] == state.velocity[:, :-1]).all(dim=-1)
    assert torch.allclose(step[straight], state.velocity[:, 1:][straight])
    assert 0.5 < straight.double().mean() < 1  # there are bounces
    assert (step.norm(dim=-1) <= speed[:, 1:] + 1e-9).all()


def test_the_background_moves_against_the_camera_and_reveals_new_texture() -> None:
    config = SpritesConfig(size=48, frames=2)
    _, state = draw(config, 8, seed=4)
    state = replace(state, camera=torch.tensor([[0.0, 0.0], [5.0, -3.0]]).repeat(8, 1, 1).double())
    video, hidden = render(config, state).int(), sprite_mask(config, state)
    before, after = video[:, 0, :-3, 5:], video[:, 1, 3:, :-5]
    seen = ~(hidden[:, 0, :-3, 5:] | hidden[:, 1, 3:, :-5])
    assert (before - after)[seen].abs().max() <= 1
    assert seen.double().mean() > 0.5
    revealed = video[:, 1, :, -5:].float()
    for old in video[:, 0, :, -5:].float(), video[:, 0, :, :5].float():  # no copy, no wrap-around
        assert (revealed - old).abs().mean() > 5


def test_a_shape_is_painted_where_the_state_puts_it() -> None:
    config = SpritesConfig(size=64, frames=3, num_sprites=1)
    _, state = draw(config, 40, seed=5)
    video = render(config, state).float()
    recolored = render(config, replace(state, color=(state.color + 1) % len(COLORS))).float()
    weight = (video - recolored).abs().sum(dim=-1)
    axis = torch.arange(64) + 0.5
    total = weight.sum(dim=(2, 3))
    center = torch.stack(
        [(weight.sum(2) * axis).sum(-1) / total, (weight.sum(3) * axis).sum(-1) / total], dim=-1
    )
    error = (center - state.position[:, :, 0]).norm(dim=-1)
    assert error.median() < 0.5
    assert error.max() < 1.5  # stripes pull the weighted centre a little
    assert not weight[~sprite_mask(config, state)].any()


def test_edges_are_smooth_under_subpixel_shifts() -> None:
    config = SpritesConfig(size=48, frames=1)
    _, state = draw(config, 4, seed=6)
    shifted = replace(state, position=state.position + 0.25)
    quarter = (render(config, shifted).int() - render(config, state).int()).abs()
    assert 0 < quarter.max() <= 0.6 * 255


def test_the_texture_has_contrast_at_several_frequencies() -> None:
    config = SpritesConfig(size=64, frames=1)
    _, state = draw(config, 32, seed=7)
    far = replace(state, radius=state.radius * 1e-3)  # shapes shrink to nothing
    light = render(config, far)[:, 0].float().mean(dim=-1)
    assert light.std(dim=(1, 2)).mean() > 25
    light = light - light.mean(dim=(1, 2), keepdim=True)
    window = torch.hann_window(64)
    energy = torch.fft.fft2(light * window * window[:, None]).abs().square().mean(dim=0)
    frequency = torch.fft.fftfreq(64)
    radius = torch.hypot(frequency[:, None], frequency)
    total = energy.sum()
    for low, high, least in ((0.0, 0.04, 0.1), (0.04, 0.08, 0.1), (0.08, 0.2, 0.02)):
        assert energy[(radius >= low) & (radius < high)].sum() / total > least
    finer = render(replace(config, texture_frequency=2.0), far)[:, 0].float()
    coarse = render(config, far)[:, 0].float()
    assert finer.diff(dim=1).abs().mean() > 1.3 * coarse.diff(dim=1).abs().mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.gpu
def test_the_gpu_draws_the_same() -> None:
    cpu, gpu = (
        draw(CONFIG, 4, seed=8, device=device)[0].video.cpu().int() for device in ("cpu", "cuda")
    )
    assert (cpu - gpu).abs().max() <= 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw(CONFIG, 4, seed=9, device="cuda")  # the host does not wait for the device
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 8),
        ("frames", 0),
        ("num_sprites", 4),
        ("pan_share", 1.2),
        ("texture_frequency", 0.0),
        ("pan_speed", (0.02, 0.01)),
        ("radius", (0.0, 0.1)),
        ("fast_speed", (0.1, 0.5)),
    ],
)
def test_impossible_settings_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        SpritesConfig(**{field: value})  # type: ignore[arg-type]


def test_a_count_or_start_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1, got 0"):
        draw(CONFIG, 0, seed=0)
    with pytest.raises(UserError, match="at least 0, got -1"):
        draw(CONFIG, 1, seed=0, start=-1)
