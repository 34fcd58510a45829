"""Rotary embedding: against complex exponentials, and its relative property."""

from __future__ import annotations

import pytest
import torch

from aad1.core.rope import axis_dims, rope_table, rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim,want", [(128, (44, 42, 42)), (64, (24, 20, 20)), (6, (2, 2, 2))])
def test_axis_dims_are_wans(head_dim: int, want: tuple[int, int, int]) -> None:
    assert axis_dims(head_dim) == want


def test_rotation_is_multiplication_by_complex_exponentials() -> None:
    head_dim, theta = 12, 100.0
    x = torch.randn(2, 3, 2 * 2, 5, head_dim)
    positions = (7, 1, 4)
    got = rotate(x, rope_table(positions, 2, 2, head_dim, theta, CPU))
    z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    t_dim, h_dim, w_dim = axis_dims(head_dim)
    for f, row, column in ((0, 0, 1), (1, 1, 0), (2, 1, 1)):
        angles = []
        for place, dim in ((positions[f], t_dim), (row, h_dim), (column, w_dim)):
            angles += [place * theta ** (-2 * i / dim) for i in range(dim // 2)]
        turned = z[:, f, row * 2 + column] * torch.exp(1j * torch.tensor(angles).double())
        want = torch.view_as_real(turned).flatten(-2).float()
        torch.testing.assert_close(got[:, f, row * 2 + column], want, atol=1e-5, rtol=1e-5)


def test_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 1, 24).unbind(0)

    def score(a: int, b: int) -> float:
        qr = rotate(q, rope_table((a,), 1, 1, 24, 1e4, CPU))
        kr = rotate(k, rope_table((b,), 1, 1, 24, 1e4, CPU))
        return float((qr * kr).sum())

    assert score(5, 2) == pytest.approx(score(1003, 1000), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-4)


def test_rotation_keeps_length_and_dtype() -> None:
    x = torch.randn(1, 2, 4, 3, 12)
    table = rope_table((3, 9), 2, 2, 12, 1e4, CPU)
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16
    # strided input, as slices of a cache are
    wide = torch.randn(1, 2, 4, 3, 24)
    torch.testing.assert_close(
        rotate(wide[..., ::2], table), rotate(wide[..., ::2].contiguous(), table)
    )


def test_a_table_made_in_inference_mode_serves_training() -> None:
    rope_table.cache_clear()
    with torch.inference_mode():
        rope_table((0, 1), 1, 1, 6, 1e4, CPU)
    x = torch.randn(1, 2, 1, 1, 6, requires_grad=True)
    rotate(x, rope_table((0, 1), 1, 1, 6, 1e4, CPU)).sum().backward()
    assert x.grad is not None
