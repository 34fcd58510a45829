"""Figures: pairing, floors, intervals, reasons instead of numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from aad1.errors import UserError
from aad1.evaluate.compare import (
    CONSISTENCY,
    DRIFT,
    METRICS,
    MOTION,
    QUALITY,
    Reference,
    beside,
    compare,
    groups_of,
    wasserstein,
)
from aad1.evaluate.frechet import temporal_features
from aad1.evaluate.measure import Measured, measure
from aad1.evaluate.networks import for_world
from aad1.evaluate.report import Gaussian
from aad1.worlds.sprites import SpritesConfig, draw

CONFIG = SpritesConfig(size=32, frames=17)
ALL = (*MOTION, *QUALITY, *DRIFT)
N = 24


def measured(seed: int, name: str, count: int = N) -> Measured:
    video = draw(CONFIG, count, seed=seed)[0].video
    return measure(video, fps=4, keys=[f"{name} {i}" for i in range(count)])


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.of(measured(1, "real"))


@pytest.fixture(scope="module")
def other() -> Measured:
    return measured(2, "other")


@pytest.fixture(scope="module")
def generated() -> Measured:
    return measured(3, "clip")


def test_real_videos_are_near_their_floor(
    reference: Reference, other: Measured, generated: Measured
) -> None:
    figures = compare(generated, reference, other, ALL, resamples=200)
    assert figures["M"].value == pytest.approx(1, abs=0.25)
    for name in ("FDtd", "FDnss_early", "FDnss_late", "niqe", "W1_flow"):
        figure = figures[name]
        assert figure.value is not None and figure.floor is not None
        assert 0.2 < figure.value / figure.floor < 5, name
        assert figure.videos == figure.floor_videos == N
    assert figures["drift_5s"].value is None
    assert "two segments of 5 s" in figures["drift_5s"].reason
    for name in ("M", "late_M", "niqe", "drift_2s", "drift_ratio_2s"):
        interval, value = figures[name].interval, figures[name].value
        assert interval is not None and value is not None
        assert interval[0] < value < interval[1], name


def test_figures_are_those_of_the_functions_beneath(
    reference: Reference, generated: Measured
) -> None:
    figures = compare(generated, reference, None, ALL, resamples=0)
    video = draw(CONFIG, N, seed=3)[0].video
    real = draw(CONFIG, N, seed=1)[0].video
    expected = Gaussian.of(temporal_features(real)).distance(temporal_features(video))
    assert figures["FDtd"].value == pytest.approx(expected, rel=1e-6)
    assert figures["FDtd"].floor is None
    sharp = generated.nss[:, 1:, 6].mean() - reference.videos.nss[:, 1:, 6].mean()
    assert figures["sharpness"].value == pytest.approx(math.exp(sharp), rel=1e-9)


def test_the_true_continuation_is_the_denominator(reference: Reference) -> None:
    """Four clips that move half as much as their own real continuations have an M of 1 / 2."""
    some = reference.videos.select([0, 5, 7, 9])
    slow = replace(some, magnitude=some.magnitude / 2)
    figures = compare(slow, reference, None, [METRICS["M"]], resamples=0)
    assert figures["M"].value == pytest.approx(0.5)
    strangers = replace(slow, keys=("a", "b", "c", "d"))
    unpaired = compare(strangers, reference, None, [METRICS["M"]], resamples=0)["M"].value
    assert unpaired == pytest.approx(
        float(slow.magnitude.mean() / reference.videos.magnitude.mean())
    )
    assert unpaired != pytest.approx(0.5, abs=1e-3)


def test_what_cannot_be_computed_says_why_and_is_not_0(
    reference: Reference, other: Measured, generated: Measured
) -> None:
    few = compare(generated.select(range(5)), reference, other, ALL, resamples=0)
    for name in ("FDtd", "FDnss_early", "FDnss_late"):
        assert few[name].value is None
        assert few[name].reason == "needs at least 16 videos, 5 are there"
    assert few["M"].value is not None
    nss = generated.nss.clone()
    nss[3, 4, 0] = math.nan
    figures = compare(replace(generated, nss=nss), reference, other, ALL, resamples=0)
    for name in ("niqe", "drift_2s", "signed_drift"):
        assert figures[name].value is None and "not finite" in figures[name].reason
    assert figures["FDtd"].value is not None


def test_static_videos_win_what_M_must_stand_beside(
    reference: Reference, other: Measured, generated: Measured
) -> None:
    video = draw(CONFIG, N, seed=3)[0].video
    frozen = measure(video[:, :1].expand_as(video), fps=4, keys=list(generated.keys))
    own = compare(frozen, reference, other, ALL, resamples=0)
    own = beside(own, own["M"])
    true = compare(generated, reference, other, ALL, resamples=0)
    assert own["M"].value == pytest.approx(0, abs=1e-4)
    assert own["S"].value == 1.0
    assert own["smoothness"].value > true["smoothness"].value
    assert own["drift_2s"].value < true["drift_2s"].value
    assert own["flicker"].value < true["flicker"].value
    for name in ("smoothness", "flicker", "drift_2s", "drift_ratio_2s", "FDnss_late", "niqe"):
        assert own["M"].value == own[name].M, name
    assert own["FDtd"].M is None
    assert own["FDtd"].value > 20 * own["FDtd"].floor


def test_the_networks_figures() -> None:
    """Real clips lie at the floor; still ones are perfectly consistent, and M says so beside; and
    without networks there is a reason instead of a number."""
    networks = for_world("sprites")
    real, other, made = (draw(CONFIG, N, seed=s)[0].video for s in (1, 2, 3))

    def seen(video: torch.Tensor, name: str) -> Measured:
        keys = [f"{name} {i}" for i in range(N)]
        return measure(video, fps=4, keys=keys, networks=networks)

    reference = Reference.of(seen(real, "real"))
    chosen = [METRICS["M"], METRICS["FD_motion"], *CONSISTENCY]
    true = compare(seen(made, "clip"), reference, seen(other, "other"), chosen, resamples=200)
    frozen = seen(made[:, :1].expand_as(made), "clip")
    still = compare(frozen, reference, None, chosen, resamples=0)
    still = beside(still, still["M"])
    assert true["FD_motion"].value / true["FD_motion"].floor < 3  # type: ignore[operator]
    assert still["FD_motion"].value > 4 * true["FD_motion"].floor  # type: ignore[operator]
    for metric in CONSISTENCY:
        assert still[metric.name].value == pytest.approx(1, abs=1e-4)
        assert still[metric.name].value > true[metric.name].value  # type: ignore[operator]
        assert still["M"].value == still[metric.name].M
        assert true[metric.name].interval is not None
    blind = measure(made, fps=4, keys=[f"clip {i}" for i in range(N)])
    figures = compare(blind, reference, None, chosen, resamples=0)
    for name in ("FD_motion", "consistency_subject"):
        assert figures[name].value is None
        assert figures[name].reason.startswith("there are no metric networks")


def test_other_shapes_are_refused(reference: Reference) -> None:
    video = draw(replace(CONFIG, frames=13), 2, seed=0)[0].video
    short = measure(video, fps=4, keys=["a", "b"])
    with pytest.raises(UserError, match="same frames, got 13 and 17"):
        compare(short, reference, None, ALL)


def test_real_videos_that_stand_still_are_refused() -> None:
    video = draw(CONFIG, 4, seed=0)[0].video
    still = measure(video[:, :1].expand_as(video), fps=4, keys=list("abcd"))
    with pytest.raises(UserError, match="must move"):
        Reference.of(still)


def test_groups() -> None:
    assert groups_of(10, 4) == [range(4), range(4, 8)]
    assert groups_of(10, 16) == [range(10)]


def test_wasserstein_against_quantiles() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=30), rng.normal(1, 2, size=20)
    # 60 equal steps of probability are whole numbers of values of both samples.
    expected = np.abs(np.repeat(np.sort(one), 2) - np.repeat(np.sort(two), 3)).mean()
    assert wasserstein(torch.tensor(one), torch.tensor(two)) == pytest.approx(expected, rel=1e-9)
