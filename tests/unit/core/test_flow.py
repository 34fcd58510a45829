"""The flow algebra against closed forms in float64."""

from __future__ import annotations

import torch

from aad1.core import flow


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shape = (3, 2, 4, 2, 2)
    return (
        torch.randn(shape, dtype=torch.float64),
        torch.randn(shape, dtype=torch.float64),
        torch.rand(3, 4, dtype=torch.float64) * 0.9 + 0.05,
    )


def test_velocity_x0_and_noise_round_trip() -> None:
    x0, noise, sigma = tensors()
    x_t, v = flow.add_noise(x0, noise, sigma), flow.velocity(x0, noise)
    torch.testing.assert_close(flow.x0_from_velocity(x_t, v, sigma), x0)
    torch.testing.assert_close(flow.noise_from_velocity(x_t, v, sigma), noise)


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, noise, sigma = tensors()
    h = 1e-6
    slope = (flow.add_noise(x0, noise, sigma + h) - flow.add_noise(x0, noise, sigma - h)) / (2 * h)
    torch.testing.assert_close(slope, flow.velocity(x0, noise), atol=1e-8, rtol=1e-8)


def test_score_is_the_gradient_of_the_gaussian_log_density() -> None:
    x0, noise, _ = tensors()
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x_t = flow.add_noise(x0, noise, sigma).requires_grad_()
    s = sigma.view(-1, 1, 1, 1, 1)
    log_p = (-((x_t - (1 - s) * x0) ** 2) / (2 * s**2)).sum()
    (want,) = torch.autograd.grad(log_p, x_t)
    torch.testing.assert_close(flow.score(x_t, x0, sigma), want)


def test_guidance_at_scale_one_is_the_conditional() -> None:
    a, b = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(flow.guide(a, b, 1.0), a)
    torch.testing.assert_close(flow.guide(a, b, 0.0), b)
    torch.testing.assert_close(flow.guide(a, b, 4.0), a + 3.0 * (a - b))


def test_grid_holds_the_few_step_levels_exactly() -> None:
    grid = flow.sigma_grid(48, 5.0)
    want = torch.tensor([1.0, 0.9375, 5 / 6, 0.625], dtype=torch.float64)
    torch.testing.assert_close(grid[[0, 12, 24, 36]], want)
    assert float(grid[-1]) == 0.0
    assert bool((grid.diff() < 0).all())
