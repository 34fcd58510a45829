"""Intervals and tests against tables and closed forms."""

from __future__ import annotations

import math

import pytest

from aad1.evidence.statistics import (
    fisher,
    holm,
    incomplete_beta,
    mean_effect,
    paired_difference,
    paired_ratio,
    t_quantile,
    t_two_sided,
)


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (7, 2.36462), (30, 2.04227)]
)
def test_quantiles_of_student_s_table(freedom: int, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, abs=1e-4)
    assert t_two_sided(t, freedom) == pytest.approx(0.05, abs=1e-5)
    assert t_two_sided(-t, freedom) == t_two_sided(t, freedom)


def test_the_beta_function_where_it_has_closed_forms() -> None:
    for x in (0.1, 0.5, 0.93):
        assert incomplete_beta(1, 3, x) == pytest.approx(1 - (1 - x) ** 3, abs=1e-12)
        arcsine = 2 / math.pi * math.asin(math.sqrt(x))
        assert incomplete_beta(0.5, 0.5, x) == pytest.approx(arcsine, abs=1e-10)
    assert t_two_sided(1.0, 1) == pytest.approx(0.5)  # Cauchy's quartile


def test_a_mean_of_four_seeds() -> None:
    effect = mean_effect({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0})
    assert effect is not None
    reach = 3.18245 * math.sqrt(5 / 3 / 4)
    assert effect.value == 2.5
    assert (effect.low, effect.high) == pytest.approx((2.5 - reach, 2.5 + reach), abs=1e-4)
    assert effect.seeds == (0, 1, 2, 3)
    assert mean_effect({0: 1.0}) is None


def test_pairing_takes_out_what_seeds_share() -> None:
    one = {0: 10.1, 1: 20.1, 2: 30.2, 3: 5.0}
    other = {0: 10.0, 1: 20.0, 2: 30.0, 7: 1.0}
    effect = paired_difference(one, other)
    assert effect is not None and effect.seeds == (0, 1, 2)
    assert effect.value == pytest.approx(0.4 / 3)
    assert effect.high < 0.3 and effect.p == pytest.approx(
        t_two_sided((0.4 / 3) / (math.sqrt(0.01 / 3) / math.sqrt(3)), 2), rel=1e-6
    )


def test_ratios_are_geometric() -> None:
    effect = paired_ratio({0: 2.0, 1: 8.0, 2: 4.0}, {0: 1.0, 1: 2.0, 2: 1.0})
    assert effect is not None
    assert effect.value == pytest.approx(32 ** (1 / 3)) and effect.null == 1
    flipped = paired_ratio({0: 1.0, 1: 2.0, 2: 1.0}, {0: 2.0, 1: 8.0, 2: 4.0})
    assert flipped is not None
    assert flipped.low == pytest.approx(1 / effect.high) and flipped.p == pytest.approx(effect.p)
    assert paired_ratio({0: 0.0, 1: 1.0}, {0: 1.0, 1: 1.0}) is None


def test_holm() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_fisher() -> None:
    assert fisher(4, 4, 0, 4) == pytest.approx(2 / 70)
    assert fisher(3, 3, 0, 3) == pytest.approx(0.1)
    assert fisher(2, 4, 2, 4) == pytest.approx(1.0)
    assert fisher(0, 4, 0, 4) == 1.0
