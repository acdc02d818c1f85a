"""Evidence about a probability that may be looked at after any number of draws, and the lower bound it gives.

``docs/smoothing.md`` holds the statement, its assumptions and the proof.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]

GUARD = 1e-6
"""Added to every threshold of a log e-value. Its terms reach n log 2, so for n up to 10^8 their sum errs by less."""

_HALVINGS = 60


def log_e_above(k: ArrayLike, n: ArrayLike, p0: ArrayLike) -> Floats:
    """log of the e-value against p <= ``p0``, after k hits in n draws.

    The likelihood ratio of p0 and of the Jeffreys mixture Beta(1/2, 1/2) restricted to q > p0. Its expectation is at
    most 1 for every p <= p0, at every stopping time.
    """
    k, n, p0 = (np.asarray(value, dtype=np.float64) for value in (k, n, p0))
    a, b = k + 0.5, n - k + 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        mixture = special.betaln(a, b) + np.log(special.betaincc(a, b, p0))
        prior = special.betaln(0.5, 0.5) + np.log(special.betaincc(0.5, 0.5, p0))
        null = special.xlogy(k, p0) + special.xlog1py(n - k, -p0)
        return np.asarray(mixture - prior - null)


def log_e_below(k: ArrayLike, n: ArrayLike, p0: ArrayLike) -> Floats:
    """The mirror image: log of the e-value against p >= ``p0``."""
    n = np.asarray(n, dtype=np.float64)
    return log_e_above(n - np.asarray(k), n, 1 - np.asarray(p0, dtype=np.float64))


def threshold(alpha: float) -> float:
    """What a log e-value must reach for an error of at most ``alpha``, over all looks together."""
    return float(-np.log(alpha)) + GUARD


def anytime_lower_bound(k: ArrayLike, n: ArrayLike, alpha: float) -> Floats:
    """The largest p0, rounded down, that k hits in n draws refute from below; 0 where they refute none.

    With probability at least 1 - ``alpha`` the true p is at least as large after every n at once: draws may stop by
    any rule, and the largest bound on the way may be reported.

    Raises:
        ValueError: counts that cannot be, or alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"a level lies between 0 and 1; got {alpha}")
    k, n = np.broadcast_arrays(np.asarray(k, dtype=np.float64), np.asarray(n, dtype=np.float64))
    if not (np.all(n >= 0) and np.all(k >= 0) and np.all(k <= n)):
        raise ValueError("counts need 0 <= k <= n")
    enough = threshold(alpha)
    low, high = np.zeros_like(k), k / np.maximum(n, 1)
    for _ in range(_HALVINGS):  # log E falls in p0 wherever it exceeds 0
        middle = (low + high) / 2
        reached = log_e_above(k, n, middle) >= enough
        low, high = np.where(reached, middle, low), np.where(reached, high, middle)
    return low
