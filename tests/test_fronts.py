"""Trade-off fronts: the oracle's, and properties that any front has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from certbench.stats.fronts import (
    Sweep,
    _resamples,
    compare,
    hull,
    hypervolume,
    nondominated,
    staircase,
)

shares = st.integers(0, 8).map(lambda n: n / 8)
clouds = st.lists(st.tuples(shares, shares), min_size=1, max_size=7).map(lambda ps: np.array(ps, dtype=float))


def test_front_and_hypervolume_are_the_oracles(oracle_folder: Path) -> None:
    with np.load(oracle_folder / "adaptive_radii" / "adaptive_radii.npz", allow_pickle=False) as oracle:
        points = oracle["front_points"]
        assert np.array_equal(nondominated(points), oracle["front_nondominated"])
        found = hypervolume(points, tuple(oracle["front_ref"]))
        assert found == pytest.approx(float(oracle["front_hypervolume"]), rel=1e-12)


@given(clouds)
def test_a_point_stands_where_no_other_is_better_in_one_and_as_good_in_both(points: np.ndarray) -> None:
    pairs = [tuple(point) for point in points.tolist()]
    for (x, y), stands in zip(pairs, nondominated(points), strict=True):
        assert stands == (not any(a >= x and b >= y and (a, b) != (x, y) for a, b in pairs))


def test_fronts_by_hand() -> None:
    assert nondominated(np.array([(1, 1), (2, 2), (2, 1), (0, 3)])).tolist() == [False, True, False, True]
    assert nondominated(np.array([(1, 1), (1, 1)])).tolist() == [True, True]
    assert nondominated(np.empty((0, 2))).tolist() == []


@given(clouds)
def test_hypervolume_counts_the_cells_of_a_grid(points: np.ndarray) -> None:
    middles = (np.arange(8) + 0.5) / 8
    covered = [any(p[0] >= a and p[1] >= r for p in points) for a in middles for r in middles]
    assert hypervolume(points, (0.0, 0.0)) == pytest.approx(np.mean(covered))
    assert hypervolume(points[nondominated(points)], (0.0, 0.0)) == pytest.approx(np.mean(covered))


@given(clouds, shares)
def test_the_hull_is_above_the_stairs_and_below_the_best_point(points: np.ndarray, accuracy: float) -> None:
    stairs, mixed = staircase(points, accuracy), hull(points, accuracy)
    assert np.isnan(stairs) == np.isnan(mixed) == bool((points[:, 0] < accuracy).all())
    if not np.isnan(stairs):
        assert stairs <= mixed <= points[:, 1].max() + 1e-12


def sweep(accuracies: list[float], robustness: list[float], seeds: int = 3, images: int = 400) -> Sweep:
    """Settings with the given accuracies; the radius of a correct image is ``robustness``."""
    numbers = (np.arange(images) + 0.5) / images
    correct = np.array([[numbers < a] * seeds for a in accuracies])
    return Sweep(correct, correct * np.array(robustness)[:, None, None])


def test_points_are_means_over_seeds_and_images() -> None:
    np.testing.assert_allclose(sweep([0.5, 0.8], [0.6, 0.25]).points(), [[0.5, 0.3], [0.8, 0.2]], atol=1e-9)


def test_ratios_are_at_the_baselines_accuracies_and_never_interpolate() -> None:
    baseline = sweep([0.5, 0.7, 0.9], [0.8, 0.4, 0.05])  # ACR 0.4, 0.28, 0.045
    challenger = sweep([0.6, 0.8], [0.8, 0.6])  # ACR 0.48, 0.48
    found = compare(challenger, baseline, constant=0.1, resamples=200)
    values = [(ratio.accuracy, ratio.reached, ratio.beyond_constant) for ratio in found.ratios]
    assert values == [(0.5, True, True), (0.7, True, True), (0.9, False, False)]
    assert [r.ratio.value for r in found.ratios] == pytest.approx([1.2, 0.48 / 0.28, 0.0])
    assert found.largest is not None and found.largest.value == pytest.approx(0.48 / 0.28)
    assert found.beyond_constant == found.largest
    assert found.mean is not None and found.mean.value == pytest.approx((1.2 * 0.48 / 0.28) ** 0.5)
    for ratio in found.ratios:
        assert ratio.ratio.low <= ratio.ratio.value <= ratio.ratio.high


def test_a_front_compared_with_itself_has_ratio_1_in_every_resample() -> None:
    one = sweep([0.5, 0.7], [0.5, 0.1])
    found = compare(one, one, constant=0.1, resamples=100)
    assert {(r.ratio.value, r.ratio.low, r.ratio.high) for r in found.ratios} == {(1.0, 1.0, 1.0)}


def test_equal_fronts_have_ratio_1_even_where_a_resample_has_no_robustness() -> None:
    one = sweep([0.005], [0.5], images=200)  # one certified image: a third of the resamples have none
    (ratio,) = compare(one, one, constant=0.1, resamples=100).ratios
    assert ratio.reached and (ratio.ratio.low, ratio.ratio.value, ratio.ratio.high) == (1, 1, 1)


def test_the_mean_is_over_what_is_reached_in_a_resample_as_in_the_rows() -> None:
    baseline = sweep([0.5, 0.79], [0.4, 0.4])
    source = np.random.RandomState(1)
    correct = (
        source.uniform(size=(2, 3, 400)) < np.array([0.6, 0.82])[:, None, None]
    )  # 0.79 is barely reached
    found = compare(Sweep(correct, correct * 0.4), baseline, constant=0.1, resamples=300)
    (sure, close), mean = found.ratios, found.mean
    assert sure.reached and close.reached and close.ratio.low == 0, "some resamples do not reach it"
    assert mean is not None and mean.low > 0.9, "and have a mean all the same"


def test_ratios_of_nothing_and_of_everything_have_mean_0() -> None:
    challenger = Sweep(np.ones((1, 2, 4), bool), np.array([[[0.0] * 4, [1.0] * 4]]))
    baseline = Sweep(np.ones((2, 2, 4), bool), np.array([[[1.0] * 4, [0.0] * 4], [[0.0] * 4, [1.0] * 4]]))
    mean = compare(challenger, baseline, constant=0.1, resamples=50).mean
    assert mean is not None and not np.isnan([mean.low, mean.value, mean.high]).any()


def test_seeds_vary_in_a_resample_as_their_mean_does() -> None:
    accuracies = np.array([0.2, 0.5, 0.8])
    correct = np.array([[(np.arange(1000) + 0.5) / 1000 < a for a in accuracies]])
    found = Sweep(correct, correct * 1.0)
    drawn = np.concatenate([found.resampled(i, s)[:, 0, 0] for i, s in _resamples((3, 1000), 4000)])
    images = (accuracies * (1 - accuracies)).mean() / 1000 / 3
    assert drawn.var() == pytest.approx(accuracies.var(ddof=1) / 3 + images, rel=0.1)


def test_the_interval_widens_with_the_spread_of_seeds_and_images() -> None:
    source = np.random.RandomState(0)
    rng = source.uniform(size=(2, 1, 3, 300))
    challenger, baseline = (Sweep(r < 0.9, (r < 0.9) * r) for r in rng)
    wide = compare(challenger, baseline, 0.1, 300).largest
    many = [Sweep(s.correct.repeat(30, 2), s.radius.repeat(30, 2)) for s in (challenger, baseline)]
    narrow = compare(*many, 0.1, 300).largest
    assert wide is not None and narrow is not None
    assert wide.high - wide.low > narrow.high - narrow.low > 0
    assert compare(challenger, baseline, 0.1, 300).largest == wide, "the same rows give the same interval"


def test_nothing_to_compare_with_is_nothing() -> None:
    found = compare(sweep([0.5], [0.5]), sweep([0.9], [0.0]), constant=0.1, resamples=10)
    assert (
        found.ratios == () and found.largest is None and found.beyond_constant is None and found.mean is None
    )
