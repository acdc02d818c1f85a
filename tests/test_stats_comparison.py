"""Paired tests, corrections, bootstrap and ranks: against hand-computed cases, scipy and statsmodels, and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from certbench.stats import binomial, bootstrap, paired
from certbench.stats.ranks import rank_ranges

# McNemar and Holm ------------------------------------------------------------------------------------------------------


def test_mcnemar_is_the_exact_binomial_test_by_hand() -> None:
    # 1 image falls to one side, 5 to the other: twice (1 + 6) / 64
    assert float(paired.mcnemar(1, 5)) == pytest.approx(14 / 64, rel=1e-12)
    assert float(paired.mcnemar(0, 0)) == 1.0 and float(paired.mcnemar(4, 4)) == 1.0
    assert float(paired.mcnemar(0, 10)) == pytest.approx(2 / 1024, rel=1e-12)


def test_mcnemar_agrees_with_scipy_and_is_symmetric() -> None:
    counts = np.array([0, 1, 2, 7, 30, 180, 2000])
    found = paired.mcnemar(counts[:, None], counts[None, :])
    np.testing.assert_array_equal(found, found.T)
    for (i, b), (j, c) in itertools.product(enumerate(counts), repeat=2):
        expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
        assert found[i, j] == pytest.approx(expected, rel=1e-9)


def test_mcnemar_and_holm_agree_with_statsmodels() -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for b, c in ((0, 3), (5, 9), (40, 60), (900, 1000)):
        expected = tables.mcnemar([[10, b], [c, 10]], exact=True).pvalue
        assert float(paired.mcnemar(b, c)) == pytest.approx(expected, rel=1e-9)
    p = np.random.default_rng(1).random(37) ** 3
    np.testing.assert_allclose(paired.holm(p), multitest.multipletests(p, method="holm")[1], rtol=1e-12)


def test_holm_by_hand() -> None:
    found = paired.holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(found, [0.03, 0.06, 0.06, 0.02], rtol=1e-12)
    assert paired.holm([]).shape == (0,) and paired.holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_discordant_images_are_counted_exactly() -> None:
    hits = np.random.default_rng(2).random((6, 1001)) < 0.7
    found = paired.only_first(hits)
    for i, j in itertools.product(range(6), repeat=2):
        assert found[i, j] == int((hits[i] & ~hits[j]).sum())


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        paired.mcnemar(-1, 2)
    with pytest.raises(ValueError, match="quantile"):
        binomial.quantile(0, 0.1, 0.9)


@pytest.mark.parametrize("n", [1, 7, 500, 10_000])
@pytest.mark.parametrize("p", [1e-3, 0.2])
def test_the_binomial_quantile_is_scipys(n: int, p: float) -> None:
    for level in (0.5, 0.95, 0.999):
        assert binomial.quantile(n, p, level) == stats.binom.ppf(level, n, p)


# Bootstrap -------------------------------------------------------------------------------------------------------------


def test_resampled_means_are_equal_to_the_bit_in_any_order_of_runs() -> None:
    values = np.random.default_rng(3).random((5, 777)) * 3.8
    all_at_once = bootstrap.resample_images(values)
    shuffled = bootstrap.resample_images(values[::-1].copy())
    np.testing.assert_array_equal(all_at_once.draws, shuffled.draws[::-1])
    one = bootstrap.resample_images(values[2:3])
    np.testing.assert_array_equal(one.draws[0], all_at_once.draws[2])
    np.testing.assert_allclose(all_at_once.means, values.mean(axis=1), rtol=1e-9)


def test_the_stream_of_draws_never_changes() -> None:
    """Committed tables hold intervals made from it."""
    drawn = bootstrap._below(np.random.PCG64(7), 1000, 5)
    assert drawn.tolist() == [625, 897, 775, 225, 300]


def test_the_spread_of_resampled_means_is_the_standard_error() -> None:
    values = np.random.default_rng(4).random((3, 4000))
    draws = bootstrap.resample_images(values).draws
    np.testing.assert_allclose(draws.std(axis=1), values.std(axis=1) / math.sqrt(4000), rtol=0.08)
    yes = values > 0.3
    np.testing.assert_allclose(
        bootstrap.resample_images(yes).draws.std(axis=1), yes.std(axis=1) / math.sqrt(4000), rtol=0.08
    )


def test_values_that_are_unknown_or_negative_are_refused() -> None:
    for bad in (np.array([[math.nan]]), np.array([[-1.0]]), np.zeros((2, 0))):
        with pytest.raises(ValueError, match="finite and not negative"):
            bootstrap.resample_images(bad)


def test_the_percentile_interval_covers_the_mean() -> None:
    generator = np.random.default_rng(5)
    true, trials = 0.25 / 3, 600
    population = np.where(generator.random((trials, 400)) < 0.25, generator.random((trials, 400)) ** 2, 0.0)
    draws = bootstrap.resample_images(population).draws
    ends = np.array([bootstrap.interval(row) for row in draws])
    covered = float(np.mean((ends[:, 0] <= true) & (true <= ends[:, 1])))
    assert 0.91 < covered < 0.98


def seeds_of(generator: np.random.Generator, seeds: int, images: int, deviation: float) -> np.ndarray:
    """Networks of one method: each seed has an accuracy of its own, images are shared."""
    difficulty = np.random.default_rng(99).random(images)
    levels = 0.6 + deviation * generator.normal(size=(seeds, 1))
    return difficulty + 0.2 * generator.random((seeds, images)) < levels


def test_equal_methods_are_told_apart_no_more_often_than_the_level_says() -> None:
    """Seeds vary far more than images: a test that took the seeds as given would reject most of the time."""
    generator = np.random.default_rng(6)
    rejected = 0
    for trial in range(300):
        values = np.concatenate([seeds_of(generator, 3, 400, 0.05) for _ in range(2)])
        sampled = bootstrap.resample_images(values)
        rows = [bootstrap.nest(sampled, part, f"{trial} {part}") for part in ([0, 1, 2], [3, 4, 5])]
        rejected += bool(bootstrap.p_values(rows)[0, 1] <= 0.05)
    assert rejected / 300 < 0.09
    naive = [bootstrap.Nested(row.mean, row.images, row.images, 0.0, 0) for row in rows]
    assert bootstrap.p_values(naive)[0, 1] < bootstrap.p_values(rows)[0, 1]


def test_pairing_finds_a_difference_that_unpaired_intervals_hide() -> None:
    generator = np.random.default_rng(7)
    difficulty = generator.random(2000)
    values = np.stack([difficulty < 0.5, difficulty < 0.52])
    rows = [bootstrap.nest(bootstrap.resample_images(values), [run], str(run)) for run in (0, 1)]
    assert bootstrap.p_values(rows)[0, 1] < 1e-4
    intervals = [binomial.interval(row.sum(), 2000) for row in values]
    assert float(intervals[0][1]) > float(intervals[1][0])


def test_one_seed_agrees_with_mcnemar() -> None:
    generator = np.random.default_rng(8)
    for lift in (0.0, 0.02, 0.05):
        one = generator.random(3000) < 0.5
        other = np.where(generator.random(3000) < 0.2, generator.random(3000) < 0.5 + lift, one)
        hits = np.stack([one, other.astype(bool)])
        only = paired.only_first(hits)
        exact = float(paired.mcnemar(only[0, 1], only[1, 0]))
        sampled = bootstrap.resample_images(hits)
        found = bootstrap.p_values([bootstrap.nest(sampled, [run], str(run)) for run in (0, 1)])[0, 1]
        assert abs(found - exact) < 0.06


# Ranks -----------------------------------------------------------------------------------------------------------------


def test_rank_ranges_by_hand() -> None:
    means = np.array([0.9, 0.8, 0.79, 0.5])
    p = np.ones((4, 4))
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3)):
        p[i, j] = p[j, i] = 1e-6
    assert rank_ranges(means, p) == [(1, 1), (2, 3), (2, 3), (4, 4)]
    assert rank_ranges(means, np.ones((4, 4))) == [(1, 4)] * 4
    assert rank_ranges(np.array([0.5]), np.ones((1, 1))) == [(1, 1)]


def test_rank_ranges_follow_the_rows_through_any_order() -> None:
    generator = np.random.default_rng(9)
    values = generator.random((7, 1500)) < np.linspace(0.5, 0.6, 7)[:, None]
    expected = _ranges(values, range(7))
    for order in (range(6, -1, -1), [3, 1, 4, 0, 6, 2, 5]):
        assert _ranges(values, order) == expected


def _ranges(values: np.ndarray, order: object) -> dict[int, tuple[int, int]]:
    places = list(order)  # type: ignore[call-overload]  # a range or a list
    hits = values[places]
    only = paired.only_first(hits)
    found = rank_ranges(hits.mean(axis=1), paired.mcnemar(only, only.T))
    return dict(zip(places, found, strict=True))


def test_a_seed_that_is_there_twice_decides_nothing_more() -> None:
    """Duplicates bring no variance and no evidence: the p-value is that of the one network."""
    values = np.random.default_rng(10).random((2, 2000)) < np.array([[0.5], [0.53]])
    once = bootstrap.resample_images(values)
    single = bootstrap.p_values([bootstrap.nest(once, [run], str(run)) for run in (0, 1)])[0, 1]
    twice = bootstrap.resample_images(np.repeat(values, 2, axis=0))
    double = bootstrap.p_values([bootstrap.nest(twice, runs, str(runs)) for runs in ([0, 1], [2, 3])])[0, 1]
    assert double == pytest.approx(single, rel=1e-9)
