"""What counts of a smoothed classifier prove: radii, predictions, and levels over a whole test set.

A network f smoothed by N(0, sigma^2 I) takes class A with probability pA at an image. If pA >= p > 1/2, the smoothed
classifier gives A at every point closer than sigma Phi^-1(p) (Cohen, Rosenfeld, Kolter 2019, arXiv 1902.02918).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from certbench.stats.binomial import lower_bound, quantile, upper_bound
from certbench.stats.evalue import anytime_lower_bound, log_e_above

Floats = NDArray[np.float64]

GUARD = 1e-9
"""Taken off every radius, in units of sigma: more than float64 errs in Phi^-1 and its argument."""


VOID_LEVEL = 0.001
"""A sound statistical row is voided with at most this probability, its audits' own errors included."""


def radius_of(lower: ArrayLike, sigma: float) -> Floats:
    """The radius, rounded down, that a lower bound on pA proves; 0 where the bound does not exceed 1/2.

    Raises:
        ValueError: sigma is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma is positive; got {sigma}")
    found = sigma * (special.ndtri(np.asarray(lower, dtype=np.float64)) - GUARD)
    return np.asarray(np.maximum(found, 0.0))


def probability_of(radius: ArrayLike, sigma: float) -> Floats:
    """The pA, rounded up, that proves a radius: ``radius_of(probability_of(r, sigma), sigma) >= r``."""
    return np.asarray(special.ndtr(np.asarray(radius, dtype=np.float64) / sigma + 2 * GUARD))


def fixed_radius(k: ArrayLike, n: ArrayLike, alpha: float, sigma: float) -> Floats:
    """From k hits in n draws, n fixed beforehand."""
    return radius_of(lower_bound(k, n, alpha), sigma)


def anytime_radius(k: ArrayLike, n: ArrayLike, alpha: float, sigma: float) -> Floats:
    """From k hits in n draws, n chosen by any rule that saw the draws."""
    return radius_of(anytime_lower_bound(k, n, alpha), sigma)


def two_sided_radius(
    k: ArrayLike, n: ArrayLike, alpha: float, sigma: float, rival: ArrayLike, rivals: int
) -> Floats:
    """``sigma / 2 (Phi^-1(pA) - Phi^-1(pB))`` from k hits and ``rival``, the largest count of any of ``rivals`` others.

    Half of alpha bounds pA from below; the other half, shared among all rivals, bounds each of them from above, since
    which of them is largest was seen in the same draws.
    """
    low = lower_bound(k, n, alpha / 2)
    high = np.minimum(upper_bound(rival, n, alpha / 2 / rivals), 1 - low)
    with np.errstate(invalid="ignore"):
        found = sigma * ((special.ndtri(low) - special.ndtri(high)) / 2 - GUARD)
    return np.asarray(np.fmax(found, 0.0))


RADII: dict[str, Callable[[ArrayLike, ArrayLike, float, float], Floats]] = {
    "smoothing": fixed_radius,
    "smoothing-label": fixed_radius,
    "smoothing-sequential": anytime_radius,
    "smoothing-sequential-label": anytime_radius,
}
"""How each certifier's radius follows from (k, n, alpha, sigma), so that anyone can compute it again."""


def proves_fixed(
    k: ArrayLike, n: ArrayLike, alpha: float, sigma: float, radius: ArrayLike
) -> NDArray[np.bool_]:
    """Whether k hits in n draws refute every pA that is too small for ``radius``: the bound's own definition."""
    p = special.ndtr(np.asarray(radius, dtype=np.float64) / sigma)
    hits, draws = (np.asarray(count, dtype=np.int64) for count in (k, n))
    return np.asarray(stats.binom.sf(hits - 1, draws, p) <= alpha)


def proves_anytime(
    k: ArrayLike, n: ArrayLike, alpha: float, sigma: float, radius: ArrayLike
) -> NDArray[np.bool_]:
    """The same where n was chosen by a rule that saw the draws."""
    p = special.ndtr(np.asarray(radius, dtype=np.float64) / sigma)
    return np.asarray(log_e_above(k, n, p) >= -np.log(alpha))


PROOFS: dict[str, Callable[[ArrayLike, ArrayLike, float, float, ArrayLike], NDArray[np.bool_]]] = {
    "smoothing": proves_fixed,
    "smoothing-label": proves_fixed,
    "smoothing-sequential": proves_anytime,
    "smoothing-sequential-label": proves_anytime,
}
"""Whether (k, n, alpha, sigma) prove a radius, by certifier."""


def predicted_class(counts: ArrayLike, alpha: float) -> NDArray[np.int64]:
    """PREDICT: the class of each row of ``counts`` (images, classes), or -1 to abstain.

    Two-sided binomial test of the top two counts at 1/2: a class that is returned differs from the smoothed
    classifier's with probability at most ``alpha``.
    """
    table = np.asarray(counts, dtype=np.int64)
    order = np.argsort(-table, axis=1, kind="stable")  # the lowest class first among equals
    first, second = (np.take_along_axis(table, order[:, j : j + 1], 1)[:, 0] for j in (0, 1))
    with np.errstate(invalid="ignore"):
        p_value = np.fmin(1.0, 2 * stats.binom.sf(first - 1, first + second, 0.5))
    return np.where(p_value > alpha, -1, order[:, 0])


# Over a test set ---------------------------------------------------------------------------------------------------


def certified_accuracy(radius: ArrayLike, right: ArrayLike, at: ArrayLike) -> Floats:
    """Share of images whose prediction is right and whose radius reaches each of ``at``; at 0: any radius above 0."""
    held = np.where(np.asarray(right, dtype=bool), np.asarray(radius, dtype=np.float64), 0.0)
    wanted = np.atleast_1d(np.asarray(at, dtype=np.float64))
    return np.array([np.mean((held >= r) & (held > 0)) for r in wanted])


def average_radius(radius: ArrayLike, right: ArrayLike) -> float:
    """ACR: the mean over all images, 0 where the prediction is wrong or missing."""
    return float(np.mean(np.where(np.asarray(right, dtype=bool), np.asarray(radius, dtype=np.float64), 0.0)))


def familywise_level(alpha: float, images: int) -> float:
    """A bound on the probability that any of ``images`` certificates is wrong, each with probability ``alpha``."""
    return min(1.0, alpha * images)


def allowed_refutations(images: int, alpha: float, audits: int = 1) -> int:
    """How many certificates ``audits`` audits may refute before their row is void: a sound row exceeds it with
    probability :data:`VOID_LEVEL` at most.

    ``images`` counts all that were tested, certified or not: each is certified wrongly with probability ``alpha`` at
    most, while of those that were certified any share may be wrong. On top come right certificates that are refuted:
    the tests of one audit err with levels that add up to ``alpha``, on draws of their own, so that j or more of them err
    with probability ``(audits alpha)^j / j!`` at most, whatever was certified.
    """
    if not images:
        return 0
    least = quantile(images, alpha, 1 - VOID_LEVEL)
    counts = range(least, images)  # the more are allowed, the less often they are exceeded
    return least + bisect_left(
        counts, -VOID_LEVEL, key=lambda most: -_exceeded(most, images, alpha, audits * alpha)
    )


def _exceeded(most: int, images: int, alpha: float, falsely: float) -> float:
    """A bound on the probability that wrong and falsely refuted certificates are more than ``most`` together."""
    wrong = np.arange(most + 1)
    needed = most + 1 - wrong
    refuted = np.exp(np.minimum(0.0, needed * np.log(falsely) - special.gammaln(needed + 1)))
    return float(
        stats.binom.sf(most, images, alpha) + np.sum(stats.binom.pmf(wrong, images, alpha) * refuted)
    )
