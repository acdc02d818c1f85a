"""Two counts of one event: honest ones hardly ever contradict each other, invented ones do."""

from __future__ import annotations

import numpy as np
import pytest

from certbench.stats.agreement import contradict
from certbench.stats.evalue import anytime_lower_bound

LEVEL, PAIRS = 0.05, 4000


@pytest.mark.parametrize("p", [0.5, 0.9, 0.999, 1.0])
def test_counts_of_one_probability_seldom_contradict(p: float) -> None:
    generator = np.random.default_rng(1)
    one, other = (generator.binomial(n, p, PAIRS) for n in (1000, 300))
    for anytime in (False, True):
        found = contradict((one, 1000), (other, 300), True, LEVEL, anytime)
        assert found.mean() <= LEVEL


def test_anytime_intervals_forgive_a_number_of_draws_that_was_chosen_by_the_draws() -> None:
    """Draws stop where they look best, so that k / n is too large; fixed intervals would cry foul."""
    generator = np.random.default_rng(2)
    looks = np.arange(100, 3001, 100)
    hits = generator.binomial(100, 0.6, (PAIRS, len(looks))).cumsum(1)
    best = (hits / looks).argmax(1)
    stopped = hits[np.arange(PAIRS), best], looks[best]
    fresh = generator.binomial(3000, 0.6, PAIRS), 3000
    assert contradict(stopped, fresh, True, 0.1, True).mean() <= 0.1
    lower = anytime_lower_bound(*stopped, 0.025)
    assert (lower > 0.6).mean() <= 0.025


@pytest.mark.parametrize("anytime", [False, True])
def test_invented_counts_contradict(anytime: bool) -> None:
    level = 0.001 / 100
    assert contradict((970, 1000), (800, 1000), True, level, anytime)
    assert contradict((800, 1000), (970, 1000), True, level, anytime)
    assert not contradict((820, 1000), (800, 1000), True, level, anytime)
    assert contradict((1000, 1000), (99_000, 100_000), True, 0.001, anytime) == (not anytime)


def test_two_classes_share_one_probability() -> None:
    """An image between two classes may be counted for either; but both cannot be likely."""
    found = contradict(([510, 900], [1000] * 2), ([495, 900], [1000] * 2), [False, False], 0.001, False)
    assert found.tolist() == [False, True]


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="counts need"):
        contradict((5, 4), (1, 4), True, 0.01, False)
