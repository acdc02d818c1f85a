"""Clopper-Pearson bounds: against scipy, against their definition, and by coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from certbench.stats.binomial import interval, lower_bound, upper_bound

COUNTS = [
    (0, 1),
    (1, 1),
    (0, 50),
    (50, 50),
    (1, 2),
    (7, 20),
    (499, 500),
    (99_900, 100_000),
    (100_000, 100_000),
]


@pytest.mark.parametrize(("k", "n"), COUNTS)
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.2])
def test_bounds_are_scipys_exact_interval_and_never_inside_it(k: int, n: int, alpha: float) -> None:
    theirs = stats.binomtest(k, n).proportion_ci(confidence_level=1 - alpha, method="exact")
    low, high = interval(k, n, alpha)
    assert low == pytest.approx(theirs.low, rel=1e-9) and high == pytest.approx(theirs.high, rel=1e-9)
    assert k == 0 or low < stats.beta.ppf(
        alpha / 2, k, n - k + 1
    )  # binomtest's root search is coarser than this
    assert k == n or high > stats.beta.isf(alpha / 2, k + 1, n - k)


@pytest.mark.parametrize(("k", "n"), COUNTS)
def test_bounds_keep_their_definition(k: int, n: int) -> None:
    low, high = float(lower_bound(k, n, 0.001)), float(upper_bound(k, n, 0.001))
    assert k == 0 or stats.binom.sf(k - 1, n, low) <= 0.001
    assert k == n or stats.binom.cdf(k, n, high) <= 0.001
    assert 0 <= low <= k / n <= high <= 1


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_the_interval_covers_as_often_as_it_says(p: float) -> None:
    n, alpha = 200, 0.05
    low, high = interval(np.arange(n + 1), n, alpha)
    missed = stats.binom.pmf(np.arange(n + 1), n, p)[(low > p) | (high < p)].sum()
    assert missed <= alpha


def test_arrays_go_through_at_once() -> None:
    low = lower_bound(np.array([0, 3, 5]), np.array([5, 5, 5]), 0.05)
    assert low.shape == (3,) and np.all(np.diff(low) > 0)


@pytest.mark.parametrize(
    ("k", "n", "alpha"), [(2, 1, 0.1), (-1, 3, 0.1), (0, 0, 0.1), (1, 2, 0.0), (1, 2, 1.0)]
)
def test_counts_and_levels_that_cannot_be_are_refused(k: int, n: int, alpha: float) -> None:
    with pytest.raises(ValueError):
        lower_bound(k, n, alpha)
