"""Bootstrap over prompts and Wilson's interval."""

from __future__ import annotations

import numpy as np
import pytest

from aad1.evaluate.intervals import bootstrap, wilson


def test_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 200)
    found = bootstrap(lambda i: float(values[i].mean()), [str(k) for k in range(200)])
    assert found is not None
    reach = 1.96 * values.std() / np.sqrt(200)
    assert found[0] == pytest.approx(values.mean() - reach, abs=0.05)
    assert found[1] == pytest.approx(values.mean() + reach, abs=0.05)


def test_samples_of_one_prompt_count_once() -> None:
    """Eight equal samples of each of 10 prompts are 10 observations, not 80."""
    values = np.repeat(np.random.default_rng(1).normal(size=10), 8)
    keys = [str(k // 8) for k in range(80)]
    whole = bootstrap(lambda i: float(values[i].mean()), keys)
    naive = bootstrap(lambda i: float(values[i].mean()), [str(k) for k in range(80)])
    assert whole is not None and naive is not None
    assert whole[1] - whole[0] > 2 * (naive[1] - naive[0])


def test_a_centered_interval_holds_the_estimate_of_a_biased_statistic() -> None:
    values = np.random.default_rng(2).normal(size=40)

    def duplicates(index: list[int]) -> float:  # as a Frechet distance: grows when videos repeat
        return float(values.mean()) + len(index) - len(set(index))

    keys = [str(k) for k in range(40)]
    plain = bootstrap(duplicates, keys)
    centered = bootstrap(duplicates, keys, centered=True)
    estimate = duplicates(list(range(40)))
    assert plain is not None and centered is not None
    assert plain[0] > estimate
    assert centered[0] < estimate < centered[1]


def test_two_prompts_have_no_interval() -> None:
    assert bootstrap(lambda i: 1.0, ["a", "a", "b"]) is None


@pytest.mark.parametrize(
    ("hits", "number", "low", "high"),
    [(0, 16, 0.0, 0.1936), (8, 10, 0.4902, 0.9433), (50, 100, 0.4038, 0.5962), (0, 0, 0, 1)],
)
def test_wilson(hits: int, number: int, low: float, high: float) -> None:
    assert wilson(hits, number) == pytest.approx((low, high), abs=1e-4)
