"""Texture by direction and scale: closed forms, and the cheats that must not pay."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from aad1.errors import UserError
from aad1.stages.codec_loss import CodecLossConfig, codec_loss
from aad1.stages.subbands import (
    LUMA,
    NAMES,
    amplitude_ratios,
    fixed_pattern,
    local_levels,
    subband_error,
    subbands,
)

ROWS = torch.arange(64.0)[:, None]
COLUMNS = torch.arange(64.0)
CHECKERBOARD = 1 - 2 * ((ROWS + COLUMNS) % 2)
FLOOR = 0.25 / 127.5


def of(image: Tensor) -> Tensor:
    """A grey image [H, W] as a video [1, 3, 1, H, W]."""
    return image.expand(1, 3, 1, *image.shape)


def levels_of_8_bits(image: Tensor) -> Tensor:
    """A grey image in [-1, 1] as uint8 [1, 1, H, W, 3]."""
    return (
        ((image + 1) * 127.5)
        .round()
        .to(torch.uint8)[None, None, :, :, None]
        .expand(1, 1, -1, -1, 3)
    )


def walls(seed: int = 0) -> Tensor:
    """Grain of all directions over broad patches, [64, 64]."""
    generator = torch.Generator().manual_seed(seed)
    grain = 0.06 * torch.randn(64, 64, generator=generator)
    patches = 0.3 * torch.randn(1, 1, 6, 6, generator=generator)
    return grain + nnf.interpolate(patches, size=(64, 64), mode="bilinear")[0, 0]


def blurred(image: Tensor) -> Tensor:
    kernel = torch.tensor([0.25, 0.5, 0.25])
    wide = nnf.pad(image[None, None], (1, 1, 1, 1), mode="replicate")
    return nnf.conv2d(wide, (kernel[:, None] * kernel)[None, None])[0, 0]


def test_the_nine_parts_hold_all_the_energy_of_an_image() -> None:
    """The frame is tight: on a periodic image, sum of squares = sum of squares of the parts."""
    image = torch.randn(1, 1, 20, 24, generator=torch.Generator().manual_seed(0))
    low, bands = subbands(nnf.pad(image, (1, 1, 1, 1), mode="circular"))
    total = low.square().sum() + bands.square().sum()
    assert float(total) == pytest.approx(float(image.square().sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("pattern", "alone"),
    [
        (CHECKERBOARD, "hh"),
        (1 - 2 * (COLUMNS % 2).expand(64, 64), "lh"),
        (1 - 2 * (ROWS % 2).expand(64, 64), "hl"),
    ],
)
def test_patterns_of_single_pixels_are_in_one_subband_alone(pattern: Tensor, alone: str) -> None:
    low, bands = subbands(pattern[None, None])
    assert float(low.abs().max()) == 0
    for name, band in zip(NAMES, bands[0], strict=True):
        expected = torch.full_like(band, float(name == alone))
        torch.testing.assert_close(band.abs(), expected, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("period", [4, 6, 16])
def test_the_amplitude_of_waves_across_and_down(period: int) -> None:
    """|m^(w)| = sin(w) / sqrt 2 and |l^(0)| = 1: a wave across is in `lm`, and in no `m.` part."""
    frequency = 2 * math.pi / period
    wave = torch.sin(frequency * COLUMNS + 0.3).expand(64, 64)
    rows = period * (60 // period)  # whole periods
    across = dict(zip(NAMES, subbands(wave[None, None])[1][0, :, :, :rows], strict=True))
    down = dict(zip(NAMES, subbands(wave.T[None, None])[1][0, :, :rows], strict=True))
    gain = math.sin(frequency) / math.sqrt(2)
    rms = float(across["lm"].square().mean().sqrt())
    assert rms == pytest.approx(gain / math.sqrt(2), rel=1e-4)
    assert float(across["ml"].abs().max()) < 1e-6
    torch.testing.assert_close(down["ml"].T, across["lm"])


def test_levels_of_a_checkerboard_in_closed_form() -> None:
    flat, board = local_levels(of(0 * CHECKERBOARD)), local_levels(of(0.1 * CHECKERBOARD))
    gain = 0.5 * math.log((0.1**2 + FLOOR**2) / FLOOR**2)
    rise = (board[0] - flat[0]).mean(dim=(0, 2, 3))
    expected = [0.0] * 13
    expected[12] = gain  # after 8 subbands and 2 diagonals: the periodic part of lh, hl and hh
    torch.testing.assert_close(rise, torch.tensor(expected), atol=2e-3, rtol=0)
    for fine, none in zip(board[1:], flat[1:], strict=True):  # the low pass removes it whole
        torch.testing.assert_close(fine, none, atol=1e-4, rtol=0)
    error = subband_error(of(0.1 * CHECKERBOARD), of(0 * CHECKERBOARD))
    assert float(error) == pytest.approx(gain / 13 / len(flat), rel=1e-3)


def test_diagonals_are_told_apart() -> None:
    falling = torch.sin(0.7 * (ROWS - COLUMNS))
    rising = torch.sin(0.7 * (ROWS + COLUMNS))
    assert float(subband_error(of(falling), of(rising))) > 0.2
    fall, rise = local_levels(of(falling))[0], local_levels(of(rising))[0]
    assert float((fall[:, :8] - rise[:, :8]).abs().mean()) < 0.05  # the subbands do not see it
    assert float((fall[:, 8] - rise[:, 8]).mean()) < -3
    assert float((fall[:, 9] - rise[:, 9]).mean()) > 3


@pytest.mark.parametrize("amount", [0.02, 0.04, 0.1])
def test_a_checkerboard_raises_the_error_and_never_pays_for_blur(amount: float) -> None:
    """The cheat that the isotropic texture term rewards is refused by this one.

    The grain's own part of one phase, 0.06 over 8 x 8 pixels, is 0.0075: all amounts are above it.
    """
    real = walls()
    soft = blurred(real)
    error = subband_error(of(soft), of(real))
    assert float(error) > 0.2
    assert float(subband_error(of(real + amount * CHECKERBOARD), of(real))) > 0.005
    latents = torch.zeros(1, 4, 1, 8, 8)

    def terms(image: Tensor) -> dict[str, Tensor]:
        return codec_loss(of(image), of(real), latents, CodecLossConfig(subbands=1.0))[1]

    plain, cheat = terms(soft), terms(soft + amount * CHECKERBOARD)
    if amount < 0.1:  # so much is beyond the texture of the source
        assert float(cheat["texture"]) < float(plain["texture"])
    assert float(cheat["subbands"]) > float(plain["subbands"])


def test_texture_in_another_place_is_no_error_worth_mentioning() -> None:
    still, moved = walls(), walls().roll((1, 2), (0, 1))
    other = subband_error(of(moved), of(still))
    assert float(other) < 0.5 * float(subband_error(of(blurred(still)), of(still)))


def test_the_term_enters_the_loss_with_its_weight() -> None:
    real, soft = of(walls()), of(blurred(walls()))
    latents = torch.zeros(1, 4, 1, 8, 8)
    plain, logs = codec_loss(soft, real, latents, CodecLossConfig())
    assert "subbands" not in logs
    more, logs = codec_loss(soft, real, latents, CodecLossConfig(subbands=0.5))
    assert float(more - plain) == pytest.approx(0.5 * float(logs["subbands"]), rel=1e-4)
    with pytest.raises(UserError, match="subbands"):
        CodecLossConfig(subbands=-1.0)


def test_the_term_is_of_frames_of_8_bits_and_has_a_gradient() -> None:
    """A faint checkerboard, less than half a level, is rounded away: it costs nothing."""
    real = ((of(walls()) + 1) * 127.5).round() / 127.5 - 1
    latents = torch.zeros(1, 4, 1, 8, 8)
    config = CodecLossConfig(subbands=1.0)
    faint = (real + 0.4 / 127.5 * CHECKERBOARD).requires_grad_()
    assert float(codec_loss(faint, real, latents, config)[1]["subbands"]) < 1e-4
    strong = (real + 2 / 127.5 * CHECKERBOARD).requires_grad_()
    loss, logs = codec_loss(strong, real, latents, config)
    assert float(logs["subbands"]) > 0.005
    (gradient,) = torch.autograd.grad(loss, strong)
    assert float((gradient * CHECKERBOARD).sum()) > 0


def test_the_loss_stays_in_float32_under_autocast() -> None:
    real, soft = of(walls()), of(blurred(walls()))
    latents = torch.zeros(1, 4, 1, 8, 8)
    config = CodecLossConfig(subbands=1.0)
    _, plain = codec_loss(soft, real, latents, config)
    with torch.autocast("cpu", torch.bfloat16):
        _, half = codec_loss(soft, real, latents, config)
    for name in ("texture", "subbands", "laplacian"):
        assert torch.equal(half[name], plain[name]), name


def test_following_the_gradient_restores_texture_and_removes_a_checkerboard() -> None:
    real = walls()
    image = (blurred(real) + 0.05 * CHECKERBOARD).requires_grad_()
    optimizer = torch.optim.Adam([image], lr=4e-3)
    before = amplitude_ratios(levels_of_8_bits(image.detach()), levels_of_8_bits(real))
    for _ in range(150):
        loss = subband_error(of(image), of(real))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = amplitude_ratios(levels_of_8_bits(image.detach()), levels_of_8_bits(real))
    assert before["nyquist"] > 3 and after["nyquist"] < 0.5 * before["nyquist"]
    for name in ("across", "down", "falling", "rising"):
        assert abs(after[name] - 1) < 0.5 * abs(before[name] - 1), (name, before, after)


def test_ratios_against_known_values() -> None:
    real = levels_of_8_bits(walls())
    assert set(amplitude_ratios(real, real).values()) == {1.0}
    wave = torch.sin(0.5 * COLUMNS).expand(64, 64) + 0.5 * torch.sin(0.5 * ROWS)
    ratios = amplitude_ratios(levels_of_8_bits(0.2 * wave), levels_of_8_bits(0.4 * wave))
    assert ratios["across"] == pytest.approx(0.5, abs=0.02)
    assert ratios["down"] == pytest.approx(0.5, abs=0.03)
    turned = amplitude_ratios(levels_of_8_bits(0.4 * wave.T), levels_of_8_bits(0.4 * wave))
    assert turned["across"] == pytest.approx(0.5, abs=0.02)
    assert turned["down"] == pytest.approx(2.0, abs=0.05)
    two = levels_of_8_bits(0.2 * CHECKERBOARD + 0 * wave)
    one = levels_of_8_bits(0.1 * CHECKERBOARD + 0 * wave)
    board = amplitude_ratios(two, one)
    assert board["checkerboard"] == pytest.approx(2, abs=0.05)
    assert board["nyquist"] == pytest.approx(2, abs=0.05)
    assert sum(LUMA) == pytest.approx(1)


def test_a_fixed_pattern_is_measured_in_closed_form_and_what_moves_is_not() -> None:
    """A wave of period 4 across, amplitude a on all colours, has root mean square a / sqrt 2."""
    torch.manual_seed(0)
    columns = torch.arange(48) * (2 * math.pi / 4)
    wave = (0.3 * columns.cos()).expand(2, 3, 5, 40, 48).clone()
    wave[1] *= 0.5
    want = torch.tensor([0.3, 0.15]) / math.sqrt(2)
    torch.testing.assert_close(fixed_pattern(wave), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fixed_pattern(wave + 0.4), want, atol=1e-5, rtol=1e-5)
    # the same wave drifting by a pixel a frame, and one of a period that is no divisor of 8
    moving = torch.stack([wave[:, :, 0].roll(t, -1) for t in range(4)], 2)
    assert float(fixed_pattern(moving).max()) < 1e-3
    other = (0.3 * (torch.arange(48) * (2 * math.pi / 6)).cos()).expand(1, 3, 5, 40, 48)
    assert float(fixed_pattern(other)) < 1e-3
    assert float(fixed_pattern(torch.randn(1, 3, 1, 7, 48))) == 0


def test_the_pattern_term_enters_with_its_weight_and_its_gradient_removes_a_pattern() -> None:
    torch.manual_seed(0)
    truth = torch.rand(1, 3, 3, 32, 32) - 0.5
    grid = 0.05 * ((torch.arange(32) % 4 == 0).float() - 0.25)
    made = (truth + grid).requires_grad_()
    plain, _ = codec_loss(made, truth, torch.zeros(1, 1, 1, 1, 1), CodecLossConfig())
    loss, logs = codec_loss(made, truth, torch.zeros(1, 1, 1, 1, 1), CodecLossConfig(pattern=3.0))
    torch.testing.assert_close(loss - plain, 3 * fixed_pattern(made - truth).mean())
    torch.testing.assert_close(logs["pattern"], fixed_pattern(made - truth).mean().detach())
    (gradient,) = torch.autograd.grad(fixed_pattern(made - truth).sum(), made)
    before = fixed_pattern(made - truth)
    after = fixed_pattern(made - 0.9 * before * gradient / gradient.square().sum() - truth)
    assert float(after) < 0.2 * float(before)
