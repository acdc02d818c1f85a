"""What counts prove: against 60-digit values, and by simulation where the truth is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from certbench.recipe import Smoothing
from certbench.smoothing import stopping
from certbench.smoothing.stopping import OPEN, Sequential, Standing
from certbench.stats.evalue import anytime_lower_bound, log_e_above, log_e_below, threshold
from certbench.stats.smoothing import (
    VOID_LEVEL,
    allowed_refutations,
    anytime_radius,
    average_radius,
    certified_accuracy,
    familywise_level,
    fixed_radius,
    predicted_class,
    probability_of,
    proves_anytime,
    proves_fixed,
    radius_of,
    two_sided_radius,
)

RUNS = 100_000
ALPHA = 0.001


@pytest.fixture(scope="module")
def oracle() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "data" / "smoothing" / "core.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def test_radii_are_the_published_certifiers_and_never_above_them(oracle: dict[str, np.ndarray]) -> None:
    columns = zip(oracle["cp_k"], oracle["cp_n"], oracle["cp_alpha"], strict=True)
    for row, (k, n, alpha) in enumerate(columns):
        for place, sigma in enumerate(oracle["cp_sigma"]):
            radius, published = fixed_radius(k, n, alpha, sigma), oracle["cp_radius"][row, place]
            assert published - 2e-8 * sigma <= radius <= max(published, 0)
        assert oracle["cp_abstain"][row] == (radius == 0)


def test_e_values_are_those_of_fifty_digits(oracle: dict[str, np.ndarray]) -> None:
    found = log_e_above(oracle["ev_k"], oracle["ev_n"], oracle["ev_p0"])
    np.testing.assert_allclose(found, oracle["ev_log"], rtol=1e-10, atol=1e-10)


def test_predict(oracle: dict[str, np.ndarray]) -> None:
    found = predicted_class(oracle["pred_counts"], float(oracle["pred_alpha"]))
    np.testing.assert_array_equal(found, oracle["pred_out"])


def test_accuracy_and_acr_of_a_log(oracle: dict[str, np.ndarray]) -> None:
    right = oracle["met_pred"] == oracle["met_label"]
    assert average_radius(oracle["met_radius"], right) == pytest.approx(float(oracle["met_acr"]), abs=1e-14)
    found = certified_accuracy(oracle["met_radius"], right, oracle["met_radii"])
    np.testing.assert_allclose(found, oracle["met_cert_acc"], atol=1e-14)


# Properties --------------------------------------------------------------------------------------------------------


counts = st.integers(1, 200_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, st.sampled_from([0.05, 0.001, 1e-6]), st.sampled_from([0.12, 0.5, 2.0]))
def test_a_radius_is_proved_by_its_counts_and_a_larger_one_is_not(
    pair: tuple[int, int], alpha: float, sigma: float
) -> None:
    k, n = pair
    for radius, proves in (
        (fixed_radius(k, n, alpha, sigma), proves_fixed),
        (anytime_radius(k, n, alpha, sigma), proves_anytime),
    ):
        assert radius >= 0
        assert radius == 0 or proves(k, n, alpha, sigma, radius)
        assert not proves(k, n, alpha, sigma, radius + 1e-6 * sigma) or radius == 0


@given(counts)
def test_the_anytime_bound_is_below_the_fixed_one_and_the_share(pair: tuple[int, int]) -> None:
    k, n = pair
    bound = anytime_lower_bound(k, n, ALPHA)
    assert 0 <= bound <= k / n
    assert bound == 0 or log_e_above(k, n, bound) >= threshold(ALPHA)
    assert radius_of(bound, 1.0) <= fixed_radius(k, n, ALPHA, 1.0)


@given(st.floats(0, 3), st.sampled_from([0.12, 0.25, 0.5, 1.0]))
def test_the_probability_of_a_radius_proves_it(radius: float, sigma: float) -> None:
    lower = probability_of(radius * sigma, sigma)
    assert radius * sigma <= radius_of(lower, sigma) <= radius * sigma + 1e-7 * sigma


@pytest.mark.parametrize("p0", [0.5, 0.691, 0.977, 0.99865])
def test_the_e_value_has_expectation_one_at_most(p0: float) -> None:
    """Exactly, over all k, below the threshold as well; its mirror image likewise."""
    for n in (1, 7, 100, 2000):
        k = np.arange(n + 1)
        for p in (p0, p0 - 0.01, p0 / 2):
            for log_e, null in (
                (log_e_above(k, n, p0), p),
                (log_e_below(k, n, 1 - p0), 1 - p),
            ):
                assert np.sum(np.exp(stats.binom.logpmf(k, n, null) + log_e)) <= 1 + 1e-9


def test_two_sided_radii() -> None:
    """Never from one side only: it gains where the mass is spread, and alpha is split for it."""
    assert two_sided_radius(450, 1000, ALPHA, 1.0, 100, 9) > 0 == fixed_radius(450, 1000, ALPHA, 1.0)
    spread = two_sided_radius(700, 1000, ALPHA, 1.0, 40, 9)
    assert spread > fixed_radius(700, 1000, ALPHA, 1.0)
    alone = two_sided_radius(700, 1000, ALPHA, 1.0, 300, 1)
    assert alone == pytest.approx(fixed_radius(700, 1000, ALPHA / 2, 1.0), abs=1e-8)
    assert two_sided_radius(400, 1000, ALPHA, 1.0, 600, 2) == 0


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_a_noise_level_that_cannot_be_gives_no_radius(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma is positive"):
        radius_of(0.9, sigma)


@pytest.mark.parametrize(("k", "n", "alpha"), [(5, 4, 0.01), (-1, 4, 0.01), (1, 4, 0.0), (1, 4, 1.0)])
def test_counts_and_levels_that_cannot_be_give_no_radius(k: int, n: int, alpha: float) -> None:
    for radius in (fixed_radius, anytime_radius):
        with pytest.raises(ValueError, match="counts need|level lies"):
            radius(k, n, alpha, 0.5)


def test_levels_over_a_test_set() -> None:
    assert familywise_level(0.001, 500) == pytest.approx(0.5)
    assert familywise_level(0.001, 10_000) == 1.0
    assert allowed_refutations(500, 0.001) == 4
    assert stats.binom.sf(allowed_refutations(10_000, 0.001), 10_000, 0.001) <= 0.001
    assert allowed_refutations(0, 0.001) == 0


def test_the_rule_is_found_quickly_however_many_images_and_audits_are_claimed() -> None:
    """A bundle may claim both; counting up to the answer would take hours."""
    images, began = 2_000_000, perf_counter()
    assert 0 < allowed_refutations(images, 0.4, 10_000) <= images
    assert perf_counter() - began < 60


def exceeded(allowed: int, images: int, alpha: float, tests: int, level: float) -> float:
    """The probability that wrong certificates and false alarms of ``tests`` tests are more than ``allowed``, exactly,
    where the wrong ones are as many as they may be."""
    if allowed >= images:
        return 0.0  # an image is refuted once
    wrong = np.arange(images + 1)
    return float(stats.binom.pmf(wrong, images, alpha) @ stats.binom.sf(allowed - wrong, tests, level))


@pytest.mark.parametrize("alpha", [0.0003, 0.001, 0.01, 0.1])
def test_a_sound_row_is_void_with_probability_0001_the_audits_errors_included(alpha: float) -> None:
    binding = 0
    for images in (1, 2, 5, 45, 100, 190, 360, 500, 1000, 2000):
        for audits in (1, 2, 5):
            allowed = allowed_refutations(images, alpha, audits)
            for tested in (1, 2, 20, 200):  # each audit has two tests of every certificate that it tries
                tests = 2 * tested * audits
                assert exceeded(allowed, images, alpha, tests, alpha / (2 * tested)) <= VOID_LEVEL
                alone = int(stats.binom.ppf(1 - VOID_LEVEL, images, alpha))
                binding += exceeded(alone, images, alpha, tests, alpha / (2 * tested)) > VOID_LEVEL
    assert binding, "somewhere a rule that leaves the audit's own errors out voids too often"


def test_the_rule_holds_in_a_simulation_whatever_number_is_certified() -> None:
    """The level of a test is alpha over the number of tests, which depends on the certificates themselves."""
    generator = np.random.default_rng(5)
    images, alpha, rows = 45, 0.02, 200_000
    wrong = generator.binomial(images, alpha, rows)
    certified = np.maximum(np.maximum(wrong, 1), generator.integers(0, images, rows))
    falsely = generator.binomial(2 * certified, alpha / (2 * certified))
    share = np.mean(wrong + falsely > allowed_refutations(images, alpha))
    assert share <= VOID_LEVEL + 3 * np.sqrt(VOID_LEVEL / rows)


# Coverage ----------------------------------------------------------------------------------------------------------


def too_many(errors: int, runs: int, alpha: float) -> bool:
    """More errors than a procedure of level alpha makes by chance once in a million times."""
    return bool(stats.binom.sf(errors - 1, runs, alpha) < 1e-6)


@pytest.mark.parametrize("p", [0.3, 0.5, 0.691462, 0.9, 0.977250, 0.999, 0.999968])
def test_fixed_coverage(p: float) -> None:
    n, rng = 100_000, np.random.default_rng(7)
    k, runs = np.unique(rng.binomial(n, p, RUNS), return_counts=True)
    truth = max(0.0, float(stats.norm.ppf(p)))
    errors = int(runs[fixed_radius(k, n, ALPHA, 1.0) > truth].sum())
    assert not too_many(errors, RUNS, ALPHA)


def once_each(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The function, computed once for each distinct (k, n, ...): among many runs few are distinct."""

    def call(*columns: object) -> np.ndarray:
        table = np.stack([np.asarray(c, dtype=float) for c in np.broadcast_arrays(*columns)])
        names = (
            table[0] * 1e4 + table[1] + table[2]
        )  # k and n are whole and below 1e4, the third lies below 1
        _, first, place = np.unique(names, return_index=True, return_inverse=True)
        return function(*table[:, first])[place]

    return call


@pytest.fixture
def _distinct_counts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("log_e_above", "log_e_below"):
        monkeypatch.setattr(stopping, name, once_each(getattr(stopping, name)))
    bound = once_each(lambda k, n, _: anytime_lower_bound(k, n, ALPHA))
    monkeypatch.setattr(stopping, "anytime_lower_bound", bound)
    radius = once_each(lambda k, n, _: anytime_radius(k, n, ALPHA, 0.5))
    monkeypatch.setattr(stopping, "anytime_radius", lambda k, n, alpha, sigma: radius(k, n, alpha))


def simulate(p: float, rng: np.random.Generator, goal: str, select_on_the_estimate: bool = False) -> int:
    """How many of RUNS images with two classes of probability p and 1 - p get a radius that is too large.

    Draws stop where the certifier's own rule stops them.
    """
    settings = Smoothing(n=1_000, goal=goal, radii=("0", "0.25", "0.5", "1"))
    rule, standing = Sequential(settings, 0.5), Standing.new(RUNS, 2, 4)
    standing.candidate[:] = 0
    rows = np.arange(RUNS)
    while len(rows):
        steps = rule.next_look(standing.n[rows]) - standing.n[rows]
        hits = rng.binomial(steps, p)
        standing.counts[rows, 0] += hits
        standing.counts[rows, 1] += steps - hits
        if select_on_the_estimate:
            standing.candidate[rows] = standing.counts[rows].argmax(1)
        rule.look(standing, rows)
        rows = rows[standing.reason[rows] == OPEN]
    radius = stopping.anytime_radius(standing.best_k, standing.best_n, ALPHA, 0.5)
    truth = 0.5 * stats.norm.ppf(np.where(standing.candidate == 0, p, 1 - p))
    return int((radius > np.maximum(truth, 0)).sum())


@pytest.mark.usefixtures("_distinct_counts_only")
@pytest.mark.parametrize(("p", "goal"), [(0.5, "radii"), (0.691462, "radii"), (0.691462, "tolerance")])
def test_sequential_coverage_at_its_own_stopping_times(p: float, goal: str) -> None:
    assert not too_many(simulate(p, np.random.default_rng(3), goal), RUNS, ALPHA)


@pytest.mark.usefixtures("_distinct_counts_only")
def test_selecting_the_class_on_the_draws_that_test_it_is_found_out() -> None:
    """At p = 1/2 either class may come out on top, and each of two tests errs with probability alpha."""
    n, rng = 1_000, np.random.default_rng(11)
    k = rng.binomial(n, 0.5, RUNS)
    critical = int(stats.binom.isf(ALPHA, n, 0.5)) + 1
    level = float(stats.binom.sf(critical - 1, n, 0.5))  # the level that whole counts attain
    honest = int((fixed_radius(k, n, ALPHA, 1.0) > 0).sum())
    planted = int((fixed_radius(np.maximum(k, n - k), n, ALPHA, 1.0) > 0).sum())
    assert not too_many(honest, RUNS, ALPHA)
    assert too_many(planted, RUNS, ALPHA)
    assert planted == pytest.approx(2 * level * RUNS, rel=0.3)
    sequential = [simulate(0.5, np.random.default_rng(5), "budget", select) for select in (False, True)]
    assert sequential[1] == pytest.approx(2 * sequential[0], rel=0.5)


def false_certificate(p: float, looks: list[int]) -> float:
    """The exact probability that log E against p reaches the threshold at any look, by running through all counts."""
    alive, n, error = np.ones(1), 0, 0.0
    for look in looks:
        step = stats.binom.pmf(np.arange(look - n + 1), look - n, p)
        alive, n = np.convolve(alive, step), look
        stop = log_e_above(np.arange(n + 1), n, p) >= threshold(ALPHA)
        error += float(alive[stop].sum())
        alive = np.where(stop, 0.0, alive)
    return error


@pytest.mark.parametrize("p", [0.5, 0.691462, 0.977250, 0.99865])
def test_sequential_error_at_the_threshold_exactly(p: float) -> None:
    rule, looks = Sequential(Smoothing(n=20_000), 0.5), [0]
    while looks[-1] < 20_000:
        looks.append(int(rule.next_look(np.array([looks[-1]]))[0]))
    assert looks[1:3] == [100, 200] and len(looks) < 100
    assert 0 < false_certificate(p, looks[1:]) <= ALPHA
