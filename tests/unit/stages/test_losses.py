"""Each loss against its equation, and planted bugs that must be seen."""

from __future__ import annotations

import torch

from aad1.stages import losses


def test_dmd_gradient_equals_its_closed_form() -> None:
    """d L / d x = g / numel, with the per-sample normalisation."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    real, fake = torch.randn_like(x), torch.randn_like(x)
    losses.dmd_loss(x, losses.dmd_direction(x.detach(), real, fake)).backward()
    weight = (x.detach() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(x.grad, (fake - real) / weight / x.numel())


def test_a_dmd_step_moves_towards_the_real_distribution() -> None:
    """Gaussians with known scores: descent on the loss shrinks the distance of the means.

    With the sign of the gradient flipped the mean would run away.
    """
    torch.manual_seed(0)
    real_mean, s = 2.0, 0.5
    x = torch.zeros(4096, 1, dtype=torch.float64, requires_grad=True)
    start = abs(float(x.mean()) - real_mean)
    for _ in range(20):
        x_t = (1 - s) * x.detach() + s * torch.randn_like(x)
        # posterior mean of x0 for data N(m, 1): the real mean, and the samples' own
        gain = (1 - s) / ((1 - s) ** 2 + s**2)
        real = real_mean + gain * (x_t - (1 - s) * real_mean)
        own = float(x.mean())
        fake = own + gain * (x_t - (1 - s) * own)
        (grad,) = torch.autograd.grad(losses.dmd_loss(x, losses.dmd_direction(x, real, fake)), x)
        x = (x - 0.2 * x.numel() * grad).detach().requires_grad_()
    assert abs(float(x.mean()) - real_mean) < 0.5 * start


def test_dmd_vanishes_where_the_scores_agree() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    same = torch.randn(2, 3)
    losses.dmd_loss(x, losses.dmd_direction(x.detach(), same, same)).backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) == 0


def test_adversarial_losses_are_the_logistic_ones() -> None:
    real, fake = torch.tensor([0.3, -1.0]), torch.tensor([0.7, 2.0])
    want = -(torch.log(torch.sigmoid(real)).mean() + torch.log(1 - torch.sigmoid(fake)).mean())
    torch.testing.assert_close(losses.discriminator_loss(real, fake), want)
    want = -torch.log(torch.sigmoid(fake)).mean()
    torch.testing.assert_close(losses.generator_adversarial_loss(fake), want)
    want = -torch.log(torch.sigmoid(real - fake)).mean()
    torch.testing.assert_close(losses.relativistic_loss(real, fake), want)


def test_discriminator_and_generator_pull_in_opposite_directions() -> None:
    fake = torch.zeros(1, requires_grad=True)
    (d,) = torch.autograd.grad(losses.discriminator_loss(torch.zeros(1), fake), fake)
    (g,) = torch.autograd.grad(losses.generator_adversarial_loss(fake), fake)
    assert float(d) > 0 > float(g)


def test_penalty_of_a_linear_critic_is_its_squared_slope() -> None:
    """E (w . delta)^2 = sigma^2 |w|^2: APT's form keeps sigma^2, it does not divide by it."""
    torch.manual_seed(0)
    w, sigma = torch.tensor([3.0, -4.0]), 0.05
    delta = sigma * torch.randn(200_000, 2)
    x = torch.randn(200_000, 2)
    penalty = losses.approximate_penalty(x @ w, (x + delta) @ w)
    torch.testing.assert_close(float(penalty), sigma**2 * 25.0, rtol=0.02, atol=0)
